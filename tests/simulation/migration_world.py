"""A small world in virtual time: real agents, engines and stream table over a network that loses, delays,
doubles and reorders, with crashes and a model of the manager. One seed decides everything.

What is checked here is checked from outside: the world keeps its own books of who decoded what in which
epoch, and simulates the content of every KV block, so that a token computed from a wrong or overwritten
block is noticed.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from migration_node import ENGINE, MANAGER_ADDRESS, ON_HOST, Node, ReadDone

from llumnix.api.backend import FailKind, StreamCall
from llumnix.api.stream_state import Deliver, Fail
from llumnix.api.streams import StreamTable
from llumnix.core.config import EngineConfig, FrontendConfig, MigrationConfig, SwapConfig
from llumnix.core.effects import Send
from llumnix.core.errors import TransportError
from llumnix.core.messages.control import (
    ClusterStatus,
    Fenced,
    InstanceState,
    InstanceStatus,
    MigrateOrder,
    MigrationEnded,
    MigrationOutcome,
    Place,
    Placed,
    SetDraining,
)
from llumnix.core.messages.migration import Commit, Committed, Reserve
from llumnix.core.sampling import SamplingParams
from llumnix.instance.agent import CloseReader, StartRead
from llumnix.instance.simulated_executor import simulated_token
from llumnix.migration.transports.base import ReadStats

MIGRATION = MigrationConfig(answer_timeout_s=0.25, reservation_s=0.8, outgoing_max=3, incoming_max=3)
FRONTEND = FrontendConfig(silent_probe_s=0.4, place_timeout_s=0.2)
FRONTEND_ADDRESS = "frontend"
ORDERS = 40
NO_HOST_MEMORY = SwapConfig(host_blocks=0)
FAULTS_S, HEALED_S = 2.5, 60.0
STATUS_INTERVAL_S = 0.1
TICK_S = 0.02


@dataclass(frozen=True)
class Faults:
    """How bad the network and the hosts are while faults last. Chances are per message, times in seconds.
    ``crash_near_commit``: chance that the process a commit is sent to, or comes from, dies around its
    arrival."""

    lost: float = 0.0
    doubled: float = 0.0
    delay_s: float = 0.001
    late: float = 0.0
    late_s: float = 0.5
    failed_reads: float = 0.0
    read_s: tuple[float, float] = (0.0005, 0.03)
    crashes: int = 0
    crash_near_commit: float = 0.0


@dataclass
class Client:
    """What one client asked for and has got."""

    call: StreamCall
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    aborted: bool = False

    def expected(self) -> list[int]:
        seed, start = self.call.sampling.seed, len(self.call.prompt_tokens)
        return [simulated_token(seed, start + i) for i in range(self.call.sampling.max_tokens)]


class World:
    """See the module. ``run`` does it all and raises AssertionError at the first broken promise."""

    def __init__(
        self,
        seed: int,
        faults: Faults,
        *,
        instances: int = 3,
        requests: int = 8,
        engine: EngineConfig = ENGINE,
        migration: MigrationConfig = MIGRATION,
        slowness: tuple[float, float] = (0.9, 1.3),
        swap: SwapConfig = NO_HOST_MEMORY,
        orders: int = ORDERS,
        crowded: float = 0.0,
    ) -> None:
        """``crowded``: the share of requests that go to one and the same instance while it lives."""
        self.random = random.Random(seed)
        self.engine = engine
        self.migration = migration
        self.slowness = slowness
        self.swap = swap
        self.orders, self.crowded = orders, crowded
        self.now = 0.0
        self.faults = faults
        self.waiting_moves = self.moved_from_host = self.left_kv = 0
        self._from_host: set[str] = set()
        self.present_blocks = 0
        self.outcomes: dict[MigrationOutcome, int] = dict.fromkeys(MigrationOutcome, 0)
        self.table = StreamTable("f", FRONTEND_ADDRESS, MANAGER_ADDRESS, FRONTEND)
        self.clients: dict[str, Client] = {}
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._scheduled = 0
        self._decoders: dict[tuple[str, int], Node] = {}
        self._incarnations = 0
        self._orders = 0
        self._status = 0
        self._reported: set[str] = set()
        self.nodes: dict[str, Node] = {}
        for index in range(instances):
            self._boot(f"i{index}")
        self._requests = requests

    def at(self, when: float, action: Callable[[], object]) -> None:
        self._scheduled += 1
        heapq.heappush(self._events, (when, self._scheduled, action))

    # What the network and the hosts do.

    def carry_out(self, node: Node, effects: Sequence[object]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.send(effect.address, effect.message)
            elif isinstance(effect, StartRead):
                self._read(node, effect)
            else:
                assert isinstance(effect, CloseReader)

    def send(self, address: str, message: object) -> None:
        faults = self.faults
        hands_over = isinstance(message, Commit | Committed) or (
            isinstance(message, Reserve) and message.blocks == 0
        )
        if isinstance(message, Reserve) and message.swapped:
            self._from_host.add(message.migration_id)
        self.waiting_moves += isinstance(message, Reserve) and message.blocks == 0
        if hands_over and self.random.random() < faults.crash_near_commit:
            self.at(self.now + self.random.uniform(0, 0.04), lambda: self.crash(address))
        copies = 0 if self.random.random() < faults.lost else 1 + (self.random.random() < faults.doubled)
        for _ in range(copies):
            delay_s = self.random.expovariate(1 / faults.delay_s)
            if self.random.random() < faults.late:
                delay_s += self.random.expovariate(1 / faults.late_s)
            self.at(self.now + delay_s, lambda: self._deliver(address, message))

    def _deliver(self, address: str, message: object) -> None:
        if address == FRONTEND_ADDRESS:
            self._frontend(self.table.handle(message, self.now))
        elif address == MANAGER_ADDRESS:
            self._manager(message)
        else:
            node = self.nodes.get(address)
            if node is not None and node.alive:
                node.receive(message)

    def _read(self, node: Node, order: StartRead) -> None:
        duration = self.random.uniform(*self.faults.read_s)
        fails = self.random.random() < self.faults.failed_reads

        def end() -> None:
            source = self.nodes[order.endpoint.pool_name.removesuffix(ON_HOST)]
            outcome: ReadStats | TransportError = ReadStats(len(order.source_blocks), 1, duration, duration)
            if fails or not source.alive:
                outcome = TransportError("the source is gone" if not fails else "cut short")
            memory = source.memory(order.endpoint.pool_name)
            for ours, theirs in zip(order.target_blocks, order.source_blocks, strict=True):
                node.kv[ours] = list(memory[theirs]) if not fails else [None] * ENGINE.block_size
            node.receive(ReadDone(order.migration_id, order.stage, outcome))

        self.at(self.now + duration, end)

    def _boot(self, name: str) -> Node:
        self._incarnations += 1
        node = Node.__new__(Node)
        incarnation = f"p{self._incarnations}"
        self.nodes[f"{name}/{incarnation}"] = node
        node.__init__(self, name, incarnation)  # type: ignore[misc]
        return node

    def crash(self, address: str = "") -> None:
        """One process dies without a word; its fencing is known later, its successor later still."""
        node = self.nodes[address] if address else self.random.choice(self._alive())
        if not node.alive or len(self._alive()) == 1:
            return
        node.alive = False
        gone = Fenced(node.hello.instance_id, node.hello.incarnation)
        fenced_at = self.now + self.random.uniform(0.01, 1.0)

        def fence() -> None:
            for other in self._alive():
                other.receive(gone)
            self._frontend(self.table.handle(gone, self.now))

        self.at(fenced_at, fence)
        self.at(fenced_at + 0.1, lambda: self._boot(node.hello.instance_id))

    def _alive(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.alive]

    # The manager, and whoever orders migrations.

    def _manager(self, message: object) -> None:
        alive = self._alive()
        if isinstance(message, Place) and alive:
            allowed = [node for node in alive if node.hello.instance_id not in message.exclude] or alive
            node = self.random.choice(allowed)
            if self.crowded and self.random.random() < self.crowded:
                node = allowed[0]
            self.send(
                message.frontend_address, Placed(message.request_id, node.hello.instance_id, node.address)
            )
        elif isinstance(message, MigrationEnded) and message.migration_id not in self._reported:
            self._reported.add(message.migration_id)
            if message.migration_id in self._from_host and message.outcome is MigrationOutcome.COMMITTED:
                self.moved_from_host += message.kv_bytes > 0
                self.left_kv += message.kv_bytes == 0
            self.outcomes[message.outcome] += 1

    def _tell_status(self) -> None:
        self._status += 1
        rows = tuple(
            InstanceStatus(
                n.hello.instance_id, n.hello.incarnation, n.address, InstanceState.SERVING, float(index)
            )
            for index, n in enumerate(self._alive())
        )
        self._frontend(self.table.handle(ClusterStatus(self._status, rows), self.now))
        self.at(self.now + STATUS_INTERVAL_S, self._tell_status)

    def order_migration(self, source: Node, request_id: str, target: Node) -> None:
        self._orders += 1
        order = MigrateOrder(
            migration_id=f"m{self._orders}",
            request_id=request_id,
            target_id=target.hello.instance_id,
            target_incarnation=target.hello.incarnation,
            target_address=target.address,
            reason="test",
        )
        self.send(source.address, order)

    def _order_something(self) -> None:
        source, target = self.random.choice(self._alive()), self.random.choice(list(self.nodes.values()))
        rows = source.engine.rows(source.hello.instance_id, self.now)
        swapped = [(node, row) for node in self._alive() for row in node.waiting_with_kv()]
        if swapped:  # the rare ones first, and often to where there is room
            source, row = self.random.choice(swapped)
            rows = (row,)
            if self.random.random() < 0.8:
                others = [node for node in self._alive() if not (node is source or node.agent.draining)]
                target = max(others, key=lambda node: node.engine._blocks.idle_blocks, default=target)
        if rows and source is not target:
            self.order_migration(source, self.random.choice(rows).request_id, target)
        if self.random.random() < 0.03 * ORDERS / self.orders:
            self.send(source.address, SetDraining(not source.agent.draining))

    # Clients.

    def open_request(self, number: int) -> Client:
        request_id = f"r{number}"
        prompt = tuple(self.random.randrange(256) for _ in range(self.random.choice((3, 9, 30))))
        sampling = SamplingParams(
            max_tokens=self.random.choice((5, 25, 60)), seed=self.random.randrange(1 << 30)
        )
        client = self.clients[request_id] = Client(StreamCall(request_id, prompt, sampling))
        self._frontend(self.table.open(client.call, self.now))
        return client

    def abort_request(self, client: Client) -> None:
        if not client.ended:
            client.aborted = client.ended = True
            self._frontend(self.table.abort(client.call.request_id, self.now))

    def _frontend(self, effects: Sequence[object]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.send(effect.address, effect.message)
            elif isinstance(effect, Deliver):
                client = self.clients[effect.request_id]
                assert not client.ended, f"{effect.request_id} gets tokens after its end"
                assert effect.first_index == len(client.tokens), f"{effect.request_id}: gap or repeat"
                client.tokens += effect.tokens
                client.ended = effect.finish_reason is not None
            elif isinstance(effect, Fail):
                client = self.clients[effect.request_id]
                refused = effect.kind is FailKind.OVERLOADED and not client.tokens
                assert refused, f"{effect.request_id} failed: {effect.reason}"
                client.ended = client.aborted = True
        self.table.check()

    def _frontend_ticks(self) -> None:
        self._frontend(self.table.tick(self.now))
        self.at(self.now + TICK_S, self._frontend_ticks)

    def decoded(self, node: Node, request_id: str, epoch: int) -> None:
        owner = self._decoders.setdefault((request_id, epoch), node)
        assert owner is node, f"{request_id} at {epoch} decoded by {owner.address} and {node.address}"

    # A run.

    def run_for(self, seconds: float) -> None:
        """Let time pass."""
        self._run_until(self.now + seconds)

    def run(self) -> None:
        """Faults first, then healing: all requests must end, with the right tokens and nothing left
        behind."""
        chance = self.random
        self._tell_status()
        self._frontend_ticks()
        for number in range(self._requests):
            self.at(chance.uniform(0, FAULTS_S * 0.7), partial(self._open_and_perhaps_abort, number))
        for _ in range(self.orders):
            self.at(chance.uniform(0.1, FAULTS_S), self._order_something)
        for _ in range(self.faults.crashes):
            self.at(chance.uniform(0.1, FAULTS_S), self.crash)
        self._run_until(FAULTS_S)
        self.faults = replace(Faults(), delay_s=self.faults.delay_s)
        for node in self._alive():
            node.receive(SetDraining(False))
        while not self._settled():
            assert self.now < FAULTS_S + HEALED_S, f"not settled: {self._unsettled()}"
            self._run_until(self.now + 0.5)
        for client in self.clients.values():
            if not client.aborted:
                assert client.tokens == client.expected(), f"{client.call.request_id} got other tokens"
        for node in self._alive():
            assert node.agent.fault_count == 0, node.agent.faults

    def _open_and_perhaps_abort(self, number: int) -> None:
        client = self.open_request(number)
        if self.random.random() < 0.2:
            self.at(self.now + self.random.uniform(0, 1.5), lambda: self.abort_request(client))

    def _run_until(self, end: float) -> None:
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = end

    def _settled(self) -> bool:
        if not all(client.ended for client in self.clients.values()):
            return False
        return all(
            not n.engine.has_work() and n.engine.load().reserved_blocks == 0 and not n.agent.migrating
            for n in self._alive()
        )

    def _unsettled(self) -> str:
        open_clients = [name for name, client in self.clients.items() if not client.ended]
        loads = {node.address: node.engine.load() for node in self._alive()}
        migrating = [node.address for node in self._alive() if node.agent.migrating]
        return f"open {open_clients}, migrating {migrating}, loads {loads}"
