"""The global scheduler: every global decision, as pure code.

Each entry takes an event and the time and returns effects, in the order in which they are to be carried out.
It holds nothing that cannot come back: a new one starts empty and learns the cluster from hellos and reports,
which it asks for as soon as it hears from a stranger. While it is away nothing breaks; only moves and deaths
wait.

Driven by the manager actor over ZeroMQ and by the simulator: `handle` for every message, `tick` no later than
`next_deadline`, `instance_ended` when a process is known, not guessed, to have ended.
"""

from collections.abc import Mapping

from llumnix.control import tables
from llumnix.control.audience import Audience
from llumnix.control.cluster_view import DOWN_MEMORY_S, ClusterView
from llumnix.control.decision_log import REQUESTS_MAX, DecisionLog
from llumnix.control.effects import Answered, Effect, Logged
from llumnix.control.orders import Orders
from llumnix.control.placement import Placer
from llumnix.control.policy_guard import Faults
from llumnix.control.relief import Relief
from llumnix.control.rescheduler import Ended, Rescheduler
from llumnix.control.scaler import Scaler
from llumnix.control.settings_in_force import SettingsInForce
from llumnix.control.tenant_ledger import TenantLedger
from llumnix.control.wanted_moves import WantedMoves
from llumnix.control.wishes import Wishes
from llumnix.core.admin import ClusterSummary, DecisionRow, InstanceRow, PolicyState, Refusal
from llumnix.core.config import SchedulerConfig
from llumnix.core.effects import Send
from llumnix.core.errors import ConfigurationError, ProtocolError
from llumnix.core.messages.control import (
    ClusterStatus,
    FrontendHello,
    InstanceHello,
    InstanceRole,
    InstanceState,
    MigrationEnded,
    Place,
    RequestList,
    SchedulerSettings,
)
from llumnix.core.messages.load import LoadReport
from llumnix.core.messages.migration import MoveWanted
from llumnix.core.request_names import ambiguous

__all__ = ["Answered", "Effect", "GlobalScheduler", "Logged"]

HEARTBEAT_S = 1.0
STATUS_GAP_S = 0.05  # a thousand instances that start together are told in a few messages, not a thousand
REBUILD_S = 3.0


class GlobalScheduler:
    """See the module. ``address`` is where the manager takes messages, ``now`` the time of its start."""

    def __init__(self, config: SchedulerConfig, manager_incarnation: str, address: str, now: float) -> None:
        self._faults = Faults()
        self._settings = SettingsInForce(config, self._faults)
        self._config = config
        self._incarnation = manager_incarnation
        self._started_at = now
        self._cluster = ClusterView(config)
        self._audience = Audience()
        self._decisions = DecisionLog()
        self._placer = Placer(self._settings.dispatch, self._settings.roles, self._cluster, self._decisions)
        self._rescheduler = Rescheduler(
            config, self._settings.pairing, manager_incarnation, self._cluster, self._decisions
        )
        self._wanted = WantedMoves(config, self._settings.roles, self._cluster, self._rescheduler)
        self._relief = Relief(self._settings.relief, self._cluster, self._rescheduler, self._decisions)
        self._wishes = Wishes(self._cluster)
        self._orders = Orders(manager_incarnation, address, self._cluster, self._rescheduler)
        self._tenants = TenantLedger(now)
        self._scaler = Scaler(config, self._settings.scaling, self._cluster, now)
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
                effects = self._end_migrations([ended] if ended is not None else [], now)
            case MoveWanted():
                effects = list(self._wanted.heard(message, now))
            case RequestList():
                effects = self._orders.heard(message, now)
            case SchedulerSettings():
                effects = self._hear_settings(message)
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
        effects += self._end_migrations(self._rescheduler.expire(now), now)
        effects += self._orders.expire(now)
        if now >= self._round_at:
            self._round_at = now + self._config.round_interval_s
            self._cluster.share_headroom()
            effects += self._wanted.round(now)
            effects += self._rescheduler.round(now)
            effects += self._scaler.round(now)
            effects += self._faults.take()
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
        return self._told(self._wishes.set_draining(instance_id, on), now)

    def set_role(self, instance_id: str, role: InstanceRole, now: float) -> list[Effect] | Refusal:
        """Let an instance work in another role. Repeating an order changes nothing."""
        return self._told(self._wishes.set_role(instance_id, role), now)

    def retired(self, instance_id: str, incarnation: str, now: float) -> list[Effect]:
        """It was drained in order to be stopped, and has stopped."""
        self._wishes.retire(instance_id)
        return self.instance_ended(instance_id, incarnation, now)

    def policies(self) -> PolicyState:
        """The policies and settings in force."""
        return self._settings.state()

    def set_policy(
        self, kind: str, name: str, settings: Mapping[str, str], now: float
    ) -> list[Effect] | Refusal:
        """Go by another policy of that kind, or the same with other settings, at once."""
        if self._rebuilding(now):
            return Refusal("the manager has just started and does not know the cluster yet; try again")
        try:
            self._settings.change(kind, name, settings)
        except ConfigurationError as error:
            return Refusal(str(error))
        changed = "".join(f", {setting} {value}" for setting, value in settings.items())
        fields: dict[str, str | int | float | bool] = {"kind": kind, "policy": name, **settings}
        logged = Logged("policy_changed", f"{kind} policy is now {name}{changed}", fields)
        return [logged, *self._use_settings()]

    def explain(self, request_id: str, now: float) -> tuple[DecisionRow, ...] | Refusal:
        """What was decided about a request, oldest first."""
        meant = self._decisions.called(request_id)
        if len(meant) == 1:
            return self._decisions.rows(meant[0], now)
        if meant:
            return Refusal(ambiguous(request_id, meant))
        return Refusal(
            f"nothing is known of {request_id}: this manager, up for {now - self._started_at:.0f} s, has not "
            f"decided about it, or has about {REQUESTS_MAX} others since"
        )

    def instance_rows(self, now: float) -> tuple[InstanceRow, ...]:
        """The table of instances, ordered by id."""
        return tables.instance_rows(self._cluster, now)

    def summary(self, now: float) -> ClusterSummary:
        """The cluster in one line."""
        return tables.summary(
            self._cluster,
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
        self._audience.introduced(hello.address)
        self._status_due = True
        effects += self._audience.tell(hello.address)
        effects += self._wishes.greet(record)
        if self._settings.revision:
            effects.append(Send(hello.address, self._settings.message()))
        fields: dict[str, str | int | float | bool] = {
            "instance": hello.instance_id,
            "incarnation": hello.incarnation,
            "role": record.role.value,
            "model": hello.model,
        }
        return [*effects, Logged("instance_up", f"{hello.instance_id} is up with {hello.model}", fields)]

    def _report(self, report: LoadReport, now: float) -> list[Effect]:
        if self._audience.is_dead(report.instance_id, report.incarnation):
            return []
        record = self._cluster.get(report.instance_id)
        if record is None or record.hello.incarnation != report.incarnation:
            return [*self._audience.ask_stranger(report.address, now)]
        before, was_drained = record.state, record.drained
        if not self._cluster.report(record, report, now):
            return []
        if report.policy_fault:
            self._faults.reported(report.instance_id, report.policy_fault, self._config, now)
        effects: list[Effect] = []
        if report.tenants:
            effects += self._tenants.report(report, self._cluster.size, now)
        if report.shortage is not None:
            effects += self._relief.reported(record, report.shortage, now)
        if record.state is not before:
            self._status_due = True
            if before is InstanceState.SILENT:
                text = f"{report.instance_id} reports again"
                effects.append(Logged("instance_back", text, {"instance": report.instance_id}))
        if record.drained and not was_drained:
            text = f"{report.instance_id} is empty"
            effects.append(Logged("drained", text, {"instance": report.instance_id}))
        return effects

    def _hear_settings(self, message: SchedulerSettings) -> list[Effect]:
        try:
            if not self._settings.hear(message):
                return []
        except ConfigurationError as error:
            text = f"settings kept by an instance cannot hold here, the manager's own do: {error}"
            return [Logged("policy_error", text), *self._tell_settings()]
        text = f"policies as they were before this manager started (revision {message.revision})"
        return [Logged("policy_changed", text), *self._use_settings()]

    def _use_settings(self) -> list[Effect]:
        """Let everyone go by the settings in force."""
        self._config = self._settings.config
        self._cluster.use(self._config)
        self._placer.use(self._settings.dispatch, self._settings.roles)
        self._wanted.use(self._config, self._settings.roles)
        self._relief.policy = self._settings.relief
        self._rescheduler.use(self._config, self._settings.pairing)
        self._scaler.use(self._config, self._settings.scaling)
        return self._tell_settings()

    def _tell_settings(self) -> list[Effect]:
        message = self._settings.message()
        return [Send(address, message) for address in self._instance_addresses()]

    def _fence(self, instance_id: str, incarnation: str, now: float) -> list[Effect]:
        if not self._audience.died(instance_id, incarnation, now):
            return []
        effects: list[Effect] = []
        record = self._cluster.get(instance_id)
        if record is not None and record.hello.incarnation == incarnation:
            ended = self._rescheduler.instance_ended(instance_id, now)
            self._cluster.end(record, now)
            effects += self._end_migrations(ended, now)
            self._tenants.instance_ended(instance_id)
            self._wanted.instance_ended(instance_id)
            effects += self._orders.instance_ended(instance_id, now)
            self._status_due = True
        fields: dict[str, str | int | float | bool] = {"instance": instance_id, "incarnation": incarnation}
        effects.append(Logged("instance_down", f"{instance_id} has ended", fields))
        return [*self._audience.announce(instance_id, incarnation, self._instance_addresses()), *effects]

    def _find_silent(self, now: float) -> list[Effect]:
        if now - self._ticked_at > self._config.silent_after_s / 2:
            return []  # this process stood still: the reports are waiting to be read
        effects: list[Effect] = []
        for record in self._cluster.overdue(now):
            self._status_due = True
            text = f"{record.instance_id} has not reported for {now - record.heard_at:.1f} s"
            effects.append(Logged("instance_silent", text, {"instance": record.instance_id}))
        return effects

    # Frontends.

    def _place(self, place: Place, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if not self._audience.knows(place.frontend_address, now):
            effects += self._audience.ask_stranger(place.frontend_address, now)
        if self._rebuilding(now):
            return effects
        effects.append(Send(place.frontend_address, self._placer.place(place, now)))
        effects += self._faults.take()
        return effects

    def _frontend_hello(self, hello: FrontendHello, now: float) -> list[Effect]:
        if not self._audience.heard(hello.address, now):
            return []
        self._audience.introduced(hello.address)
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
            elif record.report is not None:
                effects += self._wishes.remind(record, record.report)
                effects += self._settings.remind(record.hello.address, record.report.settings_revision)
        return effects + self._status(now)

    # Inside.

    def _end_migrations(self, migrations: list[Ended], now: float) -> list[Effect]:
        """Tell who waits for them, and let others go in their place."""
        effects: list[Effect] = []
        for ended in migrations:
            effects += self._orders.migration_ended(ended)
            effects += self._wanted.migration_ended(ended.result, now)
            self._relief.migration_ended(ended.result)
        return effects

    def _told(self, orders: list[Send | Logged] | Refusal, now: float) -> list[Effect] | Refusal:
        """An operator's order, and the news of it for everyone."""
        if isinstance(orders, Refusal) or not orders:
            return [] if isinstance(orders, list) else orders
        self._status_due = True
        return [*orders, *self._status_if_due(now)]

    def _instance_addresses(self) -> tuple[str, ...]:
        return tuple(record.hello.address for record in self._cluster.live())
