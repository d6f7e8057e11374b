"""The migrations out of one instance: begins them on order, feeds their state machines, remembers how
they ended.

Bounded: at most ``outgoing_max`` run at once; what is remembered of ended ones is the latest
REMEMBERED_MAX. Used by the agent (agent.py) alone, between engine steps.
"""

from dataclasses import dataclass

from llumnix.core.config import MigrationConfig
from llumnix.core.effects import Send
from llumnix.core.epochs import HOP_MAX, RESUME_HOPS
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import InstanceHello, MigrateOrder, MigrationOutcome
from llumnix.core.messages.migration import Committed, Denied, Refused, Reserved, StageCopied
from llumnix.core.messages.serving import Moved
from llumnix.instance.agent_memory import Latest
from llumnix.instance.engine import Engine
from llumnix.migration.alignment import Rhythm
from llumnix.migration.events import ClientAbort, PeerFenced, StepEnded, Superseded, Timeout
from llumnix.migration.pace import CopySpeeds, Pace
from llumnix.migration.source import SourceMigration
from llumnix.migration.source_state import SourceState
from llumnix.migration.tally import Tally

REMEMBERED_MAX = 4096

Answer = Reserved | Refused | StageCopied | Committed | Denied


@dataclass(frozen=True, slots=True)
class Departure:
    """Where a request went that was here, and the process that took it."""

    moved: Moved
    target_incarnation: str


class OutgoingMigrations:
    """See the module. Methods return what is to be sent."""

    def __init__(
        self, me: InstanceHello, engine: Engine, config: MigrationConfig, pace: Pace, manager_address: str
    ) -> None:
        self._me = me
        self._engine = engine
        self._config = config
        self._pace, self._speeds = pace, CopySpeeds()
        self._manager_address = manager_address
        self._running: dict[str, SourceMigration] = {}
        self._by_request: dict[str, SourceMigration] = {}
        self._ended: Latest[str, None] = Latest(REMEMBERED_MAX)
        self._departed: Latest[str, Departure] = Latest(REMEMBERED_MAX)
        self._fenced: Latest[tuple[str, str], None] = Latest(REMEMBERED_MAX)

    def __len__(self) -> int:
        return len(self._running)

    def moving(self, request_id: str) -> bool:
        """Whether a migration of this request is running."""
        return request_id in self._by_request

    def stuck(self, request_id: str) -> bool:
        """Whether its commit has gone unanswered for so long that its frontend had better continue it
        elsewhere: a new generation outdates both sides, whichever holds it."""
        migration = self._by_request.get(request_id)
        return migration is not None and migration.state is SourceState.COMMIT_UNKNOWN

    def departed(self, request_id: str) -> Moved | None:
        """Where a request went that left lately, as its frontend was told."""
        departure = self._departed.get(request_id)
        return None if departure is None else departure.moved

    def order(self, order: MigrateOrder, now: float) -> list[Send]:
        """Begin a migration, or say why not. A repeated order does nothing."""
        if order.migration_id in self._running or order.migration_id in self._ended:
            return []
        reason = self._objection(order)
        if reason:
            return [self._not_begun(order, reason, now)]
        migration = SourceMigration(
            order,
            self._me,
            engine=self._engine,
            config=self._config,
            pace=self._pace,
            speeds=self._speeds,
            manager_address=self._manager_address,
        )
        effects = migration.begin(now)
        self._running[order.migration_id] = migration
        self._by_request[order.request_id] = migration
        return effects

    def answer(self, message: Answer, arrived_at: float, now: float) -> list[Send]:
        """Take a target's message. One for a migration that has ended changes nothing."""
        migration = self._running.get(message.migration_id)
        if migration is None:
            return []
        if isinstance(message, Reserved | StageCopied):
            migration.rhythm = Rhythm(arrived_at, message.step_s)
        return self._feed(migration, message, now)

    def step_ended(self, now: float) -> list[Send]:
        """Let every migration see what the step did to its request."""
        return self._feed_all(StepEnded(), list(self._running.values()), now)

    def client_abort(self, request_id: str, epoch: int, now: float) -> list[Send] | None:
        """Abort a request that is on the move. None: it is not, so the engine alone is concerned."""
        migration = self._by_request.get(request_id)
        return None if migration is None else self._feed(migration, ClientAbort(epoch), now)

    def arrived(self, request_id: str, now: float) -> list[Send]:
        """The engine has taken a (newer) request of this id: forget older comings and goings of it."""
        self._departed.pop(request_id, None)
        migration = self._by_request.get(request_id)
        return [] if migration is None else self._feed(migration, Superseded(), now)

    def fenced(self, instance_id: str, incarnation: str, now: float) -> list[Send]:
        """A process has ended for certain: decide every migration to it."""
        self._fenced.remember((instance_id, incarnation), None)
        gone = [
            request_id
            for request_id, departure in self._departed.items()
            if departure.moved.instance_id == instance_id and departure.target_incarnation == incarnation
        ]
        for request_id in gone:
            del self._departed[request_id]
        hit = [m for m in self._running.values() if m.order.target_incarnation == incarnation]
        return self._feed_all(PeerFenced(), hit, now)

    def tick(self, now: float) -> list[Send]:
        """Act on every deadline that has passed."""
        due = [m for m in self._running.values() if m.deadline is not None and m.deadline <= now]
        return self._feed_all(Timeout(), due, now)

    def next_deadline(self) -> float | None:
        return min((m.deadline for m in self._running.values() if m.deadline is not None), default=None)

    def check(self) -> None:
        """Raise InvariantError unless the books agree with each other and with the engine."""
        if len(self._running) > self._config.outgoing_max:
            raise InvariantError(f"{len(self._running)} migrations out at once")
        for migration in self._running.values():
            request_id = migration.order.request_id
            if self._by_request.get(request_id) is not migration or migration.ended:
                raise InvariantError(f"lost track: {migration.story()}")
            if migration.undecided and self._engine.movable(request_id) is not None:
                raise InvariantError(f"in a batch with its commit open: {migration.story()}")
        if len(self._by_request) != len(self._running):
            raise InvariantError("one request in two migrations")

    def _objection(self, order: MigrateOrder) -> str:
        """Why an order is not begun; empty if it is."""
        request_id = order.request_id
        if order.target_incarnation == self._me.incarnation:
            return "source and target are the same"
        if (order.target_id, order.target_incarnation) in self._fenced:
            return "the target has ended"
        if request_id in self._by_request:
            return "the request is on the move already"
        if len(self._running) >= self._config.outgoing_max:
            return f"{len(self._running)} migrations are leaving here already"
        if self._engine.movable(request_id) is None:
            here = self._engine.holds(request_id)
            return "it has yet to join the batch here" if here else "the request is not here"
        delta = self._engine.output_since(request_id, 0)
        if delta is None or (delta.epoch & HOP_MAX) > HOP_MAX - RESUME_HOPS:
            return "the request has moved too often"
        return ""

    def _not_begun(self, order: MigrateOrder, reason: str, now: float) -> Send:
        """No refusal: that would be the target's, which is left alone for a while then."""
        self._ended.remember(order.migration_id, None)
        ended = Tally(now).ended(order, self._me, MigrationOutcome.ABORTED, reason, now)
        return Send(self._manager_address, ended)

    def _feed_all(self, event: object, migrations: list[SourceMigration], now: float) -> list[Send]:
        return [effect for migration in migrations for effect in self._feed(migration, event, now)]

    def _feed(self, migration: SourceMigration, event: object, now: float) -> list[Send]:
        began_as = migration.migration_id
        effects = migration.handle(event, now)
        if migration.ended or migration.migration_id != began_as:
            self._ended.remember(began_as, None)
            self._running[migration.migration_id] = self._running.pop(began_as)
        if migration.ended:
            order = migration.order
            del self._running[migration.migration_id]
            del self._by_request[order.request_id]
            self._engine.end_move(order.request_id)
            if migration.state is SourceState.COMMITTED:
                departure = Departure(migration.moved, order.target_incarnation)
                self._departed.remember(order.request_id, departure)
        return effects
