"""The agent: the one object that speaks for an instance. It answers frontends, the manager and the peers that
requests move to and from, and drives the instance's engine only between steps.

Whoever runs it (the engine thread of runtime/instance_server.py, a benchmark, the simulator) loops: hand
over what came in (``handle``, ``read_ended``), ``tick``, ask ``hold_until``, then run a step and report
it (``after_step``). Messages are handed over before ``tick``, so that a long step does not turn an answer
that has come into a timeout. Effects are carried out in order.

Invariants: a peer's mistake changes nothing (it is counted and kept in ``faults``); every map is bounded.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llumnix.core.config import MigrationConfig, SchedulerConfig
from llumnix.core.config_source import with_settings
from llumnix.core.effects import Send
from llumnix.core.epochs import EPOCH_MAX
from llumnix.core.errors import ConfigurationError, ProtocolError, TransportError
from llumnix.core.messages.control import (
    Fenced,
    HelloWanted,
    InstanceHello,
    ListRequests,
    MigrateOrder,
    RequestList,
    RequestStatus,
    SchedulerSettings,
    SetDraining,
    SetRole,
    TenantTotals,
)
from llumnix.core.messages.migration import (
    AbortMigration,
    Commit,
    CommitSoon,
    Committed,
    CopyStage,
    Denied,
    QueryCommit,
    Refused,
    Reserve,
    Reserved,
    StageCopied,
)
from llumnix.core.messages.serving import (
    Abort,
    Probe,
    ProbeReply,
    RejectCode,
    Rejected,
    RequestSpec,
    Submit,
    TokenBatch,
    TokenDelta,
)
from llumnix.instance.agent_incoming import IncomingMigrations
from llumnix.instance.agent_memory import Latest
from llumnix.instance.agent_outgoing import OutgoingMigrations
from llumnix.instance.agent_reports import LoadReporter
from llumnix.instance.agent_role import AgentRole
from llumnix.instance.engine import Engine, StepResult
from llumnix.migration.events import CloseReader, Effect, StartRead
from llumnix.migration.pace import Pace
from llumnix.migration.transports.base import ReadStats

__all__ = ["Agent", "CloseReader", "Effect", "StartRead"]

SUBMITTED_MAX = 8192
FAULTS_MAX = 32
NO_NEWS = frozenset((Probe, ListRequests, Submit, TenantTotals))
"""Messages that change nothing about the load, or only what is told by itself."""


class Agent:
    """See the module. Nothing here waits, and time is an argument."""

    def __init__(
        self,
        identity: InstanceHello,
        engine: Engine,
        migration: MigrationConfig,
        report_interval_s: float,
        manager_address: str,
    ) -> None:
        self._me = identity
        self._engine = engine
        self._manager_address = manager_address
        self._draining = False
        self._settings: SchedulerSettings | None = None
        self._reports = LoadReporter(identity, engine, report_interval_s, manager_address)
        self._role = AgentRole(identity, engine, manager_address)
        self._pace = Pace()
        self._outgoing = OutgoingMigrations(identity, engine, migration, self._pace, manager_address)
        self._incoming = IncomingMigrations(identity, engine, migration, self._pace)
        self._submitted: Latest[tuple[str, int], None] = Latest(SUBMITTED_MAX)
        self.fault_count = 0
        self.faults: deque[str] = deque(maxlen=FAULTS_MAX)
        """What peers got wrong lately, for logs."""
        self._handlers: dict[type, Callable[[Any, float], Sequence[Effect]]] = {
            Submit: self._submit,
            Abort: self._abort,
            Probe: self._probe,
            HelloWanted: self._hello,
            MigrateOrder: self._outgoing.order,
            SetDraining: self._set_draining,
            SetRole: self._set_role,
            SchedulerSettings: self._use_settings,
            TenantTotals: self._hear_tenants,
            Fenced: self._fenced,
            ListRequests: self._list_requests,
            Reserve: lambda message, now: self._incoming.reserve(message, self._draining, now),
        }
        for kind in (CopyStage, Commit, QueryCommit, AbortMigration):
            self._handlers[kind] = self._incoming.follow
        self._timed: dict[type, Callable[[Any, float, float], Sequence[Effect]]] = {
            CommitSoon: lambda message, arrived_at, now: self._incoming.follow(message, arrived_at),
        }
        for answer in (Reserved, Refused, StageCopied, Committed, Denied):
            self._timed[answer] = self._outgoing.answer

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def migrating(self) -> bool:
        """Whether a migration in or out is under way, so that each single step matters."""
        return len(self._outgoing) > 0 or len(self._incoming) > 0

    def quiet_until(self) -> float | None:
        """If nothing comes in, steps may be done at once up to the first that ends then or later. None: each
        of them matters."""
        if self.migrating:
            return None
        idle = self._incoming.next_deadline()
        due = self._reports.due_if_progressed()
        return due if idle is None else min(due, idle)

    def start(self, now: float) -> list[Effect]:
        """Introduce the instance to the manager."""
        return self._hello(None, now)

    def handle(self, message: object, now: float, arrived_at: float | None = None) -> list[Effect]:
        """Take one message. ``arrived_at`` is when it reached this process, if it had to wait for a
        step's end."""
        handler, timed = self._handlers.get(type(message)), self._timed.get(type(message))
        try:
            if handler is not None:
                effects = list(handler(message, now))
            elif timed is not None:
                effects = list(timed(message, now if arrived_at is None else arrived_at, now))
            else:
                raise ProtocolError(f"no instance takes {type(message).__name__}")
        except ProtocolError as error:
            self._fault(str(error))
            return []
        if type(message) not in NO_NEWS:
            self._reports.changed()
        return [*effects, *self._note_adopted(now)]

    def read_ended(
        self, migration_id: str, stage: int, outcome: ReadStats | TransportError, now: float
    ) -> list[Effect]:
        """A read that StartRead asked for has returned; nothing writes to its blocks any more."""
        effects = self._incoming.read_ended(migration_id, stage, outcome, now)
        self._reports.changed()
        return [*effects, *self._note_adopted(now)]

    def after_step(self, result: StepResult, now: float) -> list[Effect]:
        """A step is done: its tokens go out first, then what it means for migrations, then a report if
        due."""
        if result.tokens:
            self._pace.note((result.duration_s,))
            if result.steady:
                self._reports.progressed()
            else:
                self._reports.changed()
        effects = self._batches(result.deltas)
        effects += self._outgoing.step_ended(now)
        effects += self._incoming.step_ended(now)
        effects += self._role.step_ended(result.deltas.values(), now)
        return [*effects, *self._report_if_due(now)]

    def after_quiet_steps(
        self, durations_s: Sequence[float], last: Mapping[str, Sequence[TokenDelta]], now: float
    ) -> list[Effect]:
        """The engine has advanced by several steps at once, none but the last of which ended at
        ``quiet_until`` or later. ``last`` are, by frontend, the tokens of the requests that have ended."""
        self._pace.note(durations_s)
        if not last:
            self._reports.progressed()
            return self._report_if_due(now)
        self._reports.changed()
        return [*self._batches(last), *self._report_if_due(now)]

    def tick(self, now: float) -> list[Effect]:
        """Act on every deadline that has passed."""
        effects: list[Effect] = []
        if len(self._outgoing):
            effects += self._outgoing.tick(now)
        effects += self._incoming.tick(now)
        if self._reports.due(now):
            effects.append(self._report(now))
        return effects

    def next_deadline(self) -> float | None:
        """When ``tick`` has something to do at the latest."""
        deadlines = (self._outgoing.next_deadline(), self._incoming.next_deadline())
        return min([self._reports.next_deadline(), *(d for d in deadlines if d is not None)])

    def hold_until(self, now: float) -> float | None:
        """Ask right before a step. A time: do not start it yet, take what comes in until then and ask
        again, since a request is about to join. None: go ahead. An idle engine has nothing to hold."""
        return self._incoming.hold_until(now)

    def check(self) -> None:
        """Raise InvariantError unless the agent's books agree with each other and with the engine."""
        self._outgoing.check()
        self._incoming.check()

    # Frontends.

    def _submit(self, message: Submit, now: float) -> list[Effect]:
        spec = message.spec
        if (spec.request_id, spec.epoch) in self._submitted:
            return []  # the network said it twice
        if self._draining:
            return [self._rejected(spec, RejectCode.DRAINING, "the instance is being drained")]
        refusal = self._engine.submit(spec, now)
        if refusal is not None:
            return [self._rejected(spec, refusal.code, refusal.reason)]
        self._submitted.remember((spec.request_id, spec.epoch), None)
        self._reports.accepted(spec.request_id)
        self._reports.submitted(now)
        self._role.arrived(spec.request_id)
        return list(self._outgoing.arrived(spec.request_id, now))

    def _rejected(self, spec: RequestSpec, code: RejectCode, reason: str) -> Send:
        answer = Rejected(self._me.instance_id, spec.request_id, spec.epoch, code, reason)
        return Send(spec.frontend_address, answer)

    def _abort(self, message: Abort, now: float) -> list[Effect]:
        effects = self._outgoing.client_abort(message.request_id, message.epoch, now)
        if effects is None:
            self._engine.abort(message.request_id, message.epoch)
            return []
        return list(effects)

    def _probe(self, message: Probe, now: float) -> list[Effect]:
        """Missing tokens go out after the reply, before it where one went that left lately: its frontend may
        have missed that."""
        unknown: list[str] = []
        deltas: list[TokenDelta] = []
        moved: list[Effect] = []
        for request_id, index in message.requests:
            delta = self._engine.output_since(request_id, max(0, index))
            departed = self._outgoing.departed(request_id)
            if self._outgoing.stuck(request_id):
                unknown.append(request_id)
            elif departed is not None and (delta is None or departed.epoch > delta.epoch):
                # Of an older generation it tells the frontend nothing: then it is unknown, too.
                moved.append(Send(message.frontend_address, departed))
                unknown.append(request_id)
            elif delta is None:
                unknown.append(request_id)
            elif delta.tokens or delta.finish_reason is not None:
                deltas.append(delta)
        reply = ProbeReply(self._me.instance_id, tuple(unknown))
        effects: list[Effect] = [*moved, Send(message.frontend_address, reply)]
        if deltas:
            effects.append(Send(message.frontend_address, TokenBatch(self._me.instance_id, tuple(deltas))))
        return effects

    def frontend_lost(self, address: str, now: float) -> list[Effect]:
        """The connection to a frontend broke: nobody waits for its requests any more. Should it live after
        all, it finds them unknown here and continues them."""
        effects: list[Effect] = []
        for request_id in self._engine.requests_of(address):
            effects += self._abort(Abort(request_id, EPOCH_MAX), now)
        return effects

    # The manager.

    def _hello(self, message: HelloWanted | None, now: float) -> list[Effect]:
        kept = [] if self._settings is None else [Send(self._manager_address, self._settings)]
        me = replace(self._me, role=self._role.role)
        wanted = self._role.all_decoding(now)
        return [Send(self._manager_address, me), *kept, self._report(now), *wanted]

    def _set_draining(self, message: SetDraining, now: float) -> list[Effect]:
        self._draining = message.draining
        return [self._report(now)]

    def _set_role(self, message: SetRole, now: float) -> list[Effect]:
        wanted = self._role.become(message.role, now)
        return [self._report(now), *wanted]

    def _use_settings(self, message: SchedulerSettings, now: float) -> list[Effect]:
        """Settings that cannot hold here are kept for the manager all the same, and named as a fault."""
        if message.revision <= self._reports.settings_revision:
            return []
        self._settings = message
        self._reports.settings_revision = message.revision
        try:
            self._engine.configure(with_settings(SchedulerConfig(), dict(message.values)))
        except ConfigurationError as error:
            self._fault(str(error))
            self._reports.fault = str(error)
        else:
            self._reports.fault = ""
        return [self._report(now)]

    def _hear_tenants(self, message: TenantTotals, now: float) -> list[Effect]:
        self._engine.hear_tenants(message)
        return []

    def _fenced(self, message: Fenced, now: float) -> list[Effect]:
        effects: list[Effect] = [*self._outgoing.fenced(message.instance_id, message.incarnation, now)]
        return [*effects, *self._incoming.fenced(message.incarnation, now)]

    def _list_requests(self, message: ListRequests, now: float) -> list[Effect]:
        rows = self._engine.rows(self._me.instance_id, now)
        rows = tuple(
            replace(row, status=RequestStatus.MIGRATING) if self._outgoing.moving(row.request_id) else row
            for row in rows
        )
        return [Send(message.reply_address, RequestList(message.query_id, self._me.instance_id, rows))]

    def _batches(self, deltas: Mapping[str, Sequence[TokenDelta]]) -> list[Effect]:
        return [
            Send(address, TokenBatch(self._me.instance_id, tuple(produced)))
            for address, produced in deltas.items()
        ]

    def _report_if_due(self, now: float) -> list[Effect]:
        return [self._report(now)] if self._reports.due(now) else []

    def _report(self, now: float) -> Send:
        return self._reports.report(
            now,
            migrating_in=len(self._incoming),
            migrating_out=len(self._outgoing),
            draining=self._draining,
            role=self._role.role,
        )

    # Bookkeeping.

    def _note_adopted(self, now: float) -> list[Effect]:
        """Requests that have just joined are no longer departed, and count as taken."""
        effects: list[Effect] = []
        for request_id in self._incoming.take_adopted():
            self._reports.accepted(request_id)
            state = self._engine.movable(request_id)
            if state is not None and state.waiting:
                self._role.arrived(request_id)
            else:
                self._role.joined(request_id)
            effects += self._outgoing.arrived(request_id, now)
        return effects

    def _fault(self, text: str) -> None:
        self.fault_count += 1
        self.faults.append(text)
