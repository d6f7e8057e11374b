"""A toy cluster around the real global scheduler: instances that hold requests as plain numbers of blocks,
report, and carry out orders at once. Used by the control plane's unit tests; time is whatever the test
says."""

from dataclasses import dataclass, field

from llumnix.control.effects import Answered, Effect, Logged
from llumnix.control.global_scheduler import GlobalScheduler
from llumnix.core.config import SchedulerConfig
from llumnix.core.effects import Send
from llumnix.core.messages.control import (
    InstanceHello,
    InstanceRole,
    KvEndpoint,
    KvLayout,
    ListRequests,
    MigrateOrder,
    MigrationEnded,
    MigrationOutcome,
    NotPlaced,
    Place,
    Placed,
    RequestList,
    RequestRow,
    RequestStatus,
    SetDraining,
    SetRole,
)
from llumnix.core.messages.load import LoadReport, MoveCandidate
from llumnix.core.messages.migration import MoveCause, MoveWanted
from llumnix.policies.selection import Cheapest

MANAGER = "tcp://manager:1"
FRONTEND = "tcp://frontend:1"
CANDIDATES_MAX = 8


def hello(
    instance_id: str,
    incarnation: str = "a",
    *,
    model_len: int = 8192,
    layers: int = 2,
    role: InstanceRole = InstanceRole.NEUTRAL,
    adapters: tuple[str, ...] = (),
) -> InstanceHello:
    """An instance's introduction. Its address carries the incarnation, as a new process has a new port."""
    layout = KvLayout(100, layers, 2, 16, 8, "float32")
    endpoint = KvEndpoint("host", 1, -1, f"pool-{instance_id}", "tcp://kv:1")
    address = f"tcp://{instance_id}:{incarnation}"
    return InstanceHello(
        instance_id, incarnation, address, role, "tiny", model_len, layout, endpoint, adapters=adapters
    )


def place(
    request_id: str, prompt_tokens: int = 31, exclude: tuple[str, ...] = (), adapter: str = ""
) -> Place:
    """A placement asked for by the one frontend."""
    return Place(FRONTEND, request_id, prompt_tokens, 64, 0, 0, "", exclude, adapter)


@dataclass
class ToyInstance:
    """Requests by id: ``running`` hold blocks, ``waiting`` need them; ``adapters`` says which need a LoRA
    adapter. ``loaded`` adapters are in its memory."""

    instance_id: str
    incarnation: str = "a"
    capacity: int = 100
    running: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    priorities: dict[str, int] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    loaded: tuple[str, ...] = ()
    draining: bool = False
    role: InstanceRole = InstanceRole.NEUTRAL
    sequence: int = 0
    accepted: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"tcp://{self.instance_id}:{self.incarnation}"

    @property
    def free(self) -> int:
        """Blocks that no running request has."""
        return self.capacity - sum(self.running.values())

    def report(self) -> LoadReport:
        """The next load report."""
        self.sequence += 1
        accepted, self.accepted = tuple(self.accepted), []
        counts: dict[int, int] = {}
        for request_id in self.running:
            priority = self.priorities.get(request_id, 0)
            counts[priority] = counts.get(priority, 0) + 1
        rows = [
            MoveCandidate(
                request_id,
                blocks,
                self.priorities.get(request_id, 0),
                waiting,
                adapter=self.adapters.get(request_id, ""),
            )
            for held, waiting in ((self.running, False), (self.waiting, True))
            for request_id, blocks in held.items()
        ]
        return LoadReport(
            instance_id=self.instance_id,
            incarnation=self.incarnation,
            sequence=self.sequence,
            capacity_blocks=self.capacity,
            used_blocks=sum(self.running.values()),
            reserved_blocks=0,
            head_blocks=next(iter(self.waiting.values()), 0),
            waiting_blocks=sum(self.waiting.values()),
            running=len(self.running),
            waiting=len(self.waiting),
            migrating_in=0,
            migrating_out=0,
            draining=self.draining,
            execution_priorities=tuple(sorted(counts.items())),
            candidates=Cheapest(SchedulerConfig()).select(rows, CANDIDATES_MAX),
            accepted=accepted,
            step_s=0.05,
            tokens_total=0,
            preemptions_total=0,
            finished_total=0,
            address=self.address,
            role=self.role,
            adapters=self.loaded,
            head_missing_blocks=max(0, next(iter(self.waiting.values()), 0) - self.free),
        )

    def admit(self) -> None:
        """Run what fits, in order."""
        for request_id, blocks in list(self.waiting.items()):
            if blocks > self.free:
                break
            self.running[request_id] = self.waiting.pop(request_id)

    def rows(self) -> tuple[RequestRow, ...]:
        """Every request held."""
        return tuple(
            RequestRow(
                *(request_id, self.instance_id, status, "", 0, 0, 31, 1, 64, blocks, 0, 0.0),
                adapter=self.adapters.get(request_id, ""),
            )
            for held, status in ((self.running, RequestStatus.RUNNING), (self.waiting, RequestStatus.WAITING))
            for request_id, blocks in held.items()
        )


class ToyCluster:
    """Instances, the scheduler, and what it said. Messages travel at once unless a test keeps them."""

    def __init__(self, config: SchedulerConfig | None = None, **capacities: int) -> None:
        self.now = 100.0
        self.config = config or SchedulerConfig()
        self.core = GlobalScheduler(self.config, "m1", MANAGER, self.now)
        self.instances: dict[str, ToyInstance] = {}
        self.logged: list[Logged] = []
        self.answers: dict[str, object] = {}
        self.sent: list[Send] = []
        self.orders: list[MigrateOrder] = []
        self.obey = True
        for instance_id, capacity in capacities.items():
            self.add(instance_id, capacity)

    def add(
        self,
        instance_id: str,
        capacity: int = 100,
        incarnation: str = "a",
        role: InstanceRole = InstanceRole.NEUTRAL,
        adapters: tuple[str, ...] = (),
    ) -> ToyInstance:
        """A new process says hello and reports."""
        instance = self.instances[instance_id] = ToyInstance(instance_id, incarnation, capacity, role=role)
        self.do(self.core.handle(hello(instance_id, incarnation, role=role, adapters=adapters), self.now))
        self.report(instance_id)
        return instance

    def report(self, *instance_ids: str) -> None:
        """Reports of these, or of all."""
        for instance_id in instance_ids or tuple(self.instances):
            self.do(self.core.handle(self.instances[instance_id].report(), self.now))

    def place(
        self, request_id: str, prompt_tokens: int = 31, exclude: tuple[str, ...] = (), adapter: str = ""
    ) -> Placed | NotPlaced:
        """The answer to a placement."""
        effects = self.core.handle(place(request_id, prompt_tokens, exclude, adapter), self.now)
        self.do(effects)
        answers = [
            e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Placed | NotPlaced)
        ]
        assert len(answers) == 1
        return answers[0]

    def wants(self, instance_id: str, request_id: str) -> list[MigrateOrder]:
        """An instance says that a request's prefill has ended; the migrations ordered at once."""
        instance, before = self.instances[instance_id], len(self.orders)
        adapter = instance.adapters.get(request_id, "")
        row = MoveCandidate(request_id, instance.running[request_id], 0, False, adapter=adapter)
        wanted = MoveWanted(instance_id, instance.incarnation, MoveCause.PREFILLED, row)
        self.do(self.core.handle(wanted, self.now))
        return self.orders[before:]

    def tick(self, seconds: float = 0.25) -> list[Effect]:
        """Time passes."""
        self.now += seconds
        effects = self.core.tick(self.now)
        self.do(effects)
        return effects

    def step(self, seconds: float = 0.25) -> list[MigrateOrder]:
        """Everyone reports, time passes; the migrations ordered meanwhile."""
        self.report()
        before = len(self.orders)
        self.tick(seconds)
        return self.orders[before:]

    def do(self, effects: list[Effect]) -> None:
        """Carry effects out."""
        for effect in effects:
            if isinstance(effect, Logged):
                self.logged.append(effect)
            elif isinstance(effect, Answered):
                assert effect.query_id not in self.answers
                self.answers[effect.query_id] = effect.value
            else:
                self.sent.append(effect)
                self._deliver(effect)

    def messages(self, kind: type) -> list[object]:
        """All messages of a kind sent so far."""
        return [send.message for send in self.sent if isinstance(send.message, kind)]

    def events(self, kind: str) -> list[Logged]:
        """All events of a kind so far."""
        return [logged for logged in self.logged if logged.kind == kind]

    def end_migration(self, order: MigrateOrder, outcome: MigrationOutcome, source_id: str) -> None:
        """The source says how it ended; a committed request changes hands."""
        if outcome is MigrationOutcome.COMMITTED:
            source, target = self.instances[source_id], self.instances[order.target_id]
            for held in ("running", "waiting"):
                if order.request_id in getattr(source, held):
                    getattr(target, held)[order.request_id] = getattr(source, held).pop(order.request_id)
            target.priorities[order.request_id] = source.priorities.pop(order.request_id, 0)
        reason = "" if outcome is MigrationOutcome.COMMITTED else "no room"
        ended = MigrationEnded(
            order.migration_id,
            order.request_id,
            source_id,
            order.target_id,
            outcome,
            reason,
            2,
            4096,
            0.1,
            0.01,
        )
        self.do(self.core.handle(ended, self.now))

    def _deliver(self, send: Send) -> None:
        instance = next(
            (i for i in self.instances.values() if f"tcp://{i.instance_id}:{i.incarnation}" == send.address),
            None,
        )
        if instance is None:
            return
        match send.message:
            case MigrateOrder() as order:
                self.orders.append(order)
                if self.obey:
                    self.end_migration(order, MigrationOutcome.COMMITTED, instance.instance_id)
            case SetRole(role):
                instance.role = role
            case SetDraining(draining):
                instance.draining = draining
            case ListRequests(query_id) if self.obey:
                answer = RequestList(query_id, instance.instance_id, instance.rows())
                self.do(self.core.handle(answer, self.now))
