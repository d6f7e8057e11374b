"""The global scheduler: every global decision, as pure code.

Each entry takes an event and the time and returns effects, in the order in which they are to be carried out.
It holds nothing that cannot come back: a new one starts empty and learns the cluster from hellos and reports,
which it asks for as soon as it hears from a stranger. While it is away nothing breaks; only moves and deaths
wait.

Driven by the manager actor over ZeroMQ and by the simulator: `handle` for every message, `tick` no later than
`next_deadline`, `instance_ended` when a process is known, not guessed, to have ended.
"""

from llumnix.control.audience import Audience
from llumnix.control.cluster_view import DOWN_MEMORY_S, ClusterView, InstanceRecord
from llumnix.control.effects import Answered, Effect, Logged
from llumnix.control.orders import Orders
from llumnix.control.placement import Placer
from llumnix.control.rescheduler import Rescheduler
from llumnix.core.admin import ClusterSummary, InstanceRow, Refusal
from llumnix.core.config import SchedulerConfig
from llumnix.core.effects import Send
from llumnix.core.errors import ProtocolError
from llumnix.core.messages.control import (
    ClusterStatus,
    FrontendHello,
    HelloWanted,
    InstanceHello,
    InstanceState,
    LoadReport,
    MigrationEnded,
    Place,
    RequestList,
    SetDraining,
)

__all__ = ["Answered", "Effect", "GlobalScheduler", "Logged"]

HEARTBEAT_S = 1.0
STATUS_GAP_S = 0.05  # a thousand instances that start together are told in a few messages, not a thousand
ASK_AGAIN_S = 0.2
REBUILD_S = 3.0
STRANGERS_MAX = 10_000


class GlobalScheduler:
    """See the module. ``address`` is where the manager takes messages, ``now`` the time of its start."""

    def __init__(self, config: SchedulerConfig, manager_incarnation: str, address: str, now: float) -> None:
        self._config = config
        self._incarnation = manager_incarnation
        self._started_at = now
        self._cluster = ClusterView(config)
        self._audience = Audience()
        self._placer = Placer(config, self._cluster)
        self._rescheduler = Rescheduler(config, manager_incarnation, self._cluster)
        self._orders = Orders(manager_incarnation, address, self._cluster, self._rescheduler)
        self._strangers: dict[str, float] = {}
        self._status_sequence = 0
        self._status_at = now - STATUS_GAP_S
        self._status_due = False
        self._ticked_at = now
        self._heartbeat_at = now + HEARTBEAT_S
        self._round_at = now + config.round_interval_s

    # Messages.

    def handle(self, message: object, now: float) -> list[Effect]:
        """Take in one message. Raises ProtocolError for a class that nobody sends to a manager."""
        effects: list[Effect]
        match message:
            case Place():
                return self._place(message, now)
            case LoadReport():
                effects = self._report(message, now)
            case InstanceHello():
                effects = self._hello(message, now)
            case FrontendHello():
                effects = self._frontend_hello(message, now)
            case MigrationEnded():
                ended = self._rescheduler.ended(message, now)
                effects = self._orders.migration_ended(ended) if ended is not None else []
            case RequestList():
                effects = self._orders.heard(message, now)
            case _:
                raise ProtocolError(f"a manager takes no {type(message).__name__}")
        return effects + self._status_if_due(now)

    def instance_ended(self, instance_id: str, incarnation: str, now: float) -> list[Effect]:
        """Its process has ended for certain: fence it, and tell everyone."""
        return self._fence(instance_id, incarnation, now) + self._status_if_due(now)

    # Time.

    def tick(self, now: float) -> list[Effect]:
        """Do what is due: expiries, silence, overdue answers, the rescheduling round, the heartbeat."""
        self._cluster.expire(now)
        effects: list[Effect] = self._find_silent(now)
        for ended in self._rescheduler.expire(now):
            effects += self._orders.migration_ended(ended)
        effects += self._orders.expire(now)
        if now >= self._round_at:
            self._round_at = now + self._config.round_interval_s
            effects += self._rescheduler.round(now)
        if now >= self._heartbeat_at:
            effects += self._heartbeat(now)
        self._ticked_at = now
        return effects + self._status_if_due(now)

    def next_deadline(self) -> float:
        """When `tick` is to be called at the latest."""
        deadlines = [self._round_at, self._heartbeat_at]
        if self._status_due and not self._rebuilding(self._ticked_at):
            deadlines.append(self._status_at + STATUS_GAP_S)
        asked = self._orders.next_deadline()
        if asked is not None:
            deadlines.append(asked)
        return min(deadlines)

    # Administrators.

    def ask_requests(self, now: float) -> tuple[str, list[Effect]]:
        """List every request; the answer comes as Answered(query_id, rows), with what is known in time."""
        return self._orders.ask_requests(now)

    def ask_migrate(self, request_id: str, target_id: str, now: float) -> tuple[str, list[Effect]]:
        """Move a request, wherever it is; the answer comes as Answered(query_id, MigrationResult or
        Refusal)."""
        return self._orders.ask_migrate(request_id, target_id, now)

    def set_draining(self, instance_id: str, on: bool, now: float) -> list[Effect] | Refusal:
        """Empty an instance and give it nothing new, or take it back. Repeating an order changes nothing."""
        record = self._cluster.get(instance_id)
        if record is None:
            return Refusal(f"there is no instance {instance_id}")
        if record.down:
            return Refusal(f"{instance_id} is down")
        if record.draining == on:
            return []
        record.draining = on
        self._cluster.refresh(record)
        self._status_due = True
        kind, text = ("draining", "is being emptied") if on else ("resumed", "takes requests again")
        return [
            Send(record.hello.address, SetDraining(on)),
            Logged(kind, f"{instance_id} {text}", {"instance": instance_id}),
            *self._status_if_due(now),
        ]

    def instance_rows(self, now: float) -> tuple[InstanceRow, ...]:
        """The table of instances, ordered by id."""
        return tuple(self._row(record, now) for record in self._cluster.records())

    def summary(self, now: float) -> ClusterSummary:
        """The cluster in one line."""
        live = self._cluster.live()
        reports = [record.report for record in live if record.report is not None]
        return ClusterSummary(
            model=live[0].hello.model if live else "",
            instances=len(live),
            serving=sum(record.state is InstanceState.SERVING for record in live),
            running=sum(report.running for report in reports),
            waiting=sum(report.waiting for report in reports),
            migrations_running=self._cluster.moves.running_count,
            migrations_committed=self._rescheduler.committed,
            migrations_failed=self._rescheduler.failed,
            frontends=len(self._audience.frontends),
            manager_incarnation=self._incarnation,
            uptime_s=now - self._started_at,
        )

    # Instances.

    def _hello(self, hello: InstanceHello, now: float) -> list[Effect]:
        if self._audience.is_dead(hello.instance_id, hello.incarnation):
            return []
        known = self._cluster.get(hello.instance_id)
        if known is not None and known.hello.incarnation == hello.incarnation:
            return []
        effects: list[Effect] = []
        if known is not None and not known.down:
            effects += self._fence(hello.instance_id, known.hello.incarnation, now)
        record = self._cluster.hello(hello, now)
        self._strangers.pop(hello.address, None)
        self._status_due = True
        effects += self._audience.tell(hello.address)
        if record.draining:
            effects.append(Send(hello.address, SetDraining(True)))
        fields: dict[str, str | int | float | bool] = {
            "instance": hello.instance_id,
            "incarnation": hello.incarnation,
            "role": hello.role.value,
            "model": hello.model,
        }
        return [*effects, Logged("instance_up", f"{hello.instance_id} is up with {hello.model}", fields)]

    def _report(self, report: LoadReport, now: float) -> list[Effect]:
        if self._audience.is_dead(report.instance_id, report.incarnation):
            return []
        record = self._cluster.get(report.instance_id)
        if record is None or record.hello.incarnation != report.incarnation:
            return self._ask_stranger(report.address, now)
        before, last = record.state, record.report
        if not self._cluster.report(record, report, now):
            return []
        effects: list[Effect] = []
        if record.state is not before:
            self._status_due = True
            if before is InstanceState.SILENT:
                text = f"{report.instance_id} reports again"
                effects.append(Logged("instance_back", text, {"instance": report.instance_id}))
        emptied = (
            not report.running and not report.waiting and last is not None and last.running + last.waiting
        )
        if emptied and record.draining:
            text = f"{report.instance_id} is empty"
            effects.append(Logged("drained", text, {"instance": report.instance_id}))
        return effects

    def _ask_stranger(self, address: str, now: float) -> list[Effect]:
        """Ask for a hello, unless that was done a moment ago."""
        if now < self._strangers.get(address, now):
            return []
        if len(self._strangers) >= STRANGERS_MAX:
            self._strangers.clear()
        self._strangers[address] = now + ASK_AGAIN_S
        return [Send(address, HelloWanted())]

    def _fence(self, instance_id: str, incarnation: str, now: float) -> list[Effect]:
        if not self._audience.died(instance_id, incarnation, now):
            return []
        effects: list[Effect] = []
        record = self._cluster.get(instance_id)
        if record is not None and record.hello.incarnation == incarnation:
            for ended in self._rescheduler.instance_ended(instance_id, now):
                effects += self._orders.migration_ended(ended)
            self._cluster.end(record, now)
            effects += self._orders.instance_ended(instance_id, now)
            self._status_due = True
        fields: dict[str, str | int | float | bool] = {"instance": instance_id, "incarnation": incarnation}
        effects.append(Logged("instance_down", f"{instance_id} has ended", fields))
        return [*self._audience.announce(instance_id, incarnation, self._instance_addresses()), *effects]

    def _find_silent(self, now: float) -> list[Effect]:
        if now - self._ticked_at > self._config.silent_after_s / 2:
            return []  # this process stood still: the reports are waiting to be read
        effects: list[Effect] = []
        for record in self._cluster.live():
            quiet_s = now - record.heard_at
            if not record.silent and quiet_s > self._config.silent_after_s:
                record.silent = True
                self._cluster.refresh(record)
                self._status_due = True
                text = f"{record.hello.instance_id} has not reported for {quiet_s:.1f} s"
                effects.append(Logged("instance_silent", text, {"instance": record.hello.instance_id}))
        return effects

    # Frontends.

    def _place(self, place: Place, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if not self._audience.knows(place.frontend_address, now):
            effects += self._ask_stranger(place.frontend_address, now)
        if self._rebuilding(now):
            return effects
        answer, logged = self._placer.place(place, now)
        effects.append(Send(place.frontend_address, answer))
        if logged is not None:
            effects.append(logged)
        return effects

    def _frontend_hello(self, hello: FrontendHello, now: float) -> list[Effect]:
        if not self._audience.heard(hello.address, now):
            return []
        self._strangers.pop(hello.address, None)
        text = f"frontend {hello.frontend_id} is up"
        effects: list[Effect] = [Logged("frontend_up", text, {"frontend": hello.frontend_id})]
        effects += self._audience.tell(hello.address)
        if not self._rebuilding(now):
            status = ClusterStatus(self._status_sequence, self._cluster.statuses())
            effects.append(Send(hello.address, status))
        return effects

    def _rebuilding(self, now: float) -> bool:
        """Whether this manager is new and has heard no instance yet. Its empty view is no news then:
        frontends are left to their last one, which they use when a manager does not answer."""
        return not self._cluster.heard_any and now < self._started_at + REBUILD_S

    def _status_if_due(self, now: float) -> list[Effect]:
        return self._status(now) if self._status_due and now >= self._status_at + STATUS_GAP_S else []

    def _status(self, now: float) -> list[Effect]:
        if self._rebuilding(now):
            return []
        self._status_due = False
        self._status_at = now
        self._status_sequence += 1
        status = ClusterStatus(self._status_sequence, self._cluster.statuses())
        return [Send(address, status) for address in self._audience.frontends]

    def _heartbeat(self, now: float) -> list[Effect]:
        """Say again what a lost message may have hidden, and forget what is old."""
        self._heartbeat_at = now + HEARTBEAT_S
        effects: list[Effect] = []
        for address in self._audience.forget_silent(now):
            effects.append(Logged("frontend_gone", f"frontend at {address} is silent", {"address": address}))
        effects += self._audience.repeat(self._instance_addresses(), now)
        for record in self._cluster.records():
            if record.down:
                if now - record.heard_at > DOWN_MEMORY_S:
                    self._cluster.forget(record)
            elif record.report is not None and record.report.draining != record.draining:
                effects.append(Send(record.hello.address, SetDraining(record.draining)))
        self._strangers = {address: at for address, at in self._strangers.items() if at > now}
        return effects + self._status(now)

    # Inside.

    def _instance_addresses(self) -> tuple[str, ...]:
        return tuple(record.hello.address for record in self._cluster.live())

    def _row(self, record: InstanceRecord, now: float) -> InstanceRow:
        report, view = record.report, record.view
        return InstanceRow(
            instance_id=record.hello.instance_id,
            incarnation=record.hello.incarnation,
            role=record.hello.role,
            state=record.state,
            model=record.hello.model,
            address=record.hello.address,
            capacity_blocks=report.capacity_blocks if report else record.hello.kv_layout.blocks,
            used_blocks=report.used_blocks + report.reserved_blocks if report else 0,
            running=report.running if report else 0,
            waiting=report.waiting if report else 0,
            migrating_in=view.migrating_in if view else 0,
            migrating_out=view.migrating_out if view else 0,
            freeness=self._cluster.shown_freeness(record)[0],
            step_ms=report.step_s * 1e3 if report else 0.0,
            tokens_total=report.tokens_total if report else 0,
            preemptions_total=report.preemptions_total if report else 0,
            report_age_s=max(0.0, now - record.heard_at),
            pid=record.hello.kv_endpoint.pid,
        )
