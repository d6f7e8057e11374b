"""The migrations into one instance: admits them, feeds their state machines, remembers what was decided.

A decision is remembered by migration id, also for migrations never heard of that were asked about: what
was once denied stays denied, however late its messages come. The memory is bounded; a decision forgotten
after DECISIONS_MAX later ones would be answered by a denial, on which the source goes on at its own,
older epoch and is stopped by the frontend: two owners, never in one epoch. Used by the agent (agent.py)
alone, between engine steps.
"""

from dataclasses import dataclass, replace

from llumnix.core.config import MigrationConfig
from llumnix.core.effects import Send
from llumnix.core.errors import InvariantError, TransportError
from llumnix.core.messages.control import InstanceHello, KvLayout
from llumnix.core.messages.migration import (
    AbortMigration,
    Commit,
    CommitSoon,
    Committed,
    CopyStage,
    Denied,
    QueryCommit,
    RefusalCode,
    Refused,
    Reserve,
)
from llumnix.instance.agent_memory import Latest
from llumnix.instance.engine import Engine
from llumnix.migration.events import CloseReader, Effect, PeerFenced, ReadEnded, StepEnded, Timeout
from llumnix.migration.pace import Pace
from llumnix.migration.target import TargetMigration, TargetState
from llumnix.migration.transports.base import ReadStats

DECISIONS_MAX = 4096
READER_IDLE_S = 60.0
LAST_READ_HOLD_S = 0.02
"""A step waits this long, or ``hold_share`` of one if that is longer, for the last blocks of a request that
is about to join."""

Decision = Committed | Denied


@dataclass(slots=True)
class OpenPool:
    """A pool that may be open for reading. ``gone``: the process it belonged to has ended."""

    incarnation: str
    used_at: float
    gone: bool = False


class IncomingMigrations:
    """See the module. Methods return what is to be done."""

    def __init__(self, me: InstanceHello, engine: Engine, config: MigrationConfig, pace: Pace) -> None:
        self._me = me
        self._engine = engine
        self._config = config
        self._pace = pace
        self._running: dict[str, TargetMigration] = {}
        self._decided: Latest[str, tuple[str, Decision]] = Latest(DECISIONS_MAX)
        self._readers: dict[str, OpenPool] = {}
        self._holds: dict[tuple[str, bool], float] = {}
        self._adopted: list[str] = []

    def __len__(self) -> int:
        return len(self._running)

    def reserve(self, message: Reserve, draining: bool, now: float) -> list[Effect]:
        """Hold room for a request, take it if it has no KV, or refuse with the reason. Late words of a
        decided migration are ignored. Raises ProtocolError for what cannot be meant; nothing is kept then."""
        migration_id = message.migration_id
        if migration_id in self._decided:
            return []
        known = self._running.get(migration_id)
        if known is not None:
            return self._feed(known, message, now)
        refusal = self._objection(message, draining)
        if refusal is not None:
            self._decide(migration_id, message.source_address, Denied(migration_id, refusal.reason))
            return [Send(message.source_address, refusal)]
        migration = TargetMigration(message, engine=self._engine, config=self._config, pace=self._pace)
        effects = migration.begin(now)
        self._running[migration_id] = migration
        self._settle(migration, now)
        return effects

    def follow(
        self, message: CopyStage | CommitSoon | Commit | QueryCommit | AbortMigration, now: float
    ) -> list[Effect]:
        """Take any later message of a source. ``now`` is when it came in."""
        migration = self._running.get(message.migration_id)
        if migration is not None:
            return self._feed(migration, message, now)
        if isinstance(message, QueryCommit):
            unheard = (message.source_address, Denied(message.migration_id, "never heard of"))
            _, decision = self._decided.get(message.migration_id, unheard)
            self._decide(message.migration_id, message.source_address, decision)
            return [Send(message.source_address, decision)]
        if isinstance(message, Commit | AbortMigration):
            return self._too_late(message)
        return []

    def read_ended(
        self, migration_id: str, stage: int, outcome: ReadStats | TransportError, now: float
    ) -> list[Effect]:
        """A read begun by StartRead has returned. It must have been begun."""
        migration = self._running.get(migration_id)
        if migration is None:
            raise InvariantError(f"a read of migration {migration_id} ended, which nobody knows")
        return self._feed(migration, ReadEnded(stage, outcome), now)

    def step_ended(self, now: float) -> list[Effect]:
        """Let every source know whose steps have got out of the rhythm it was told."""
        running = list(self._running.values())
        return [effect for migration in running for effect in self._feed(migration, StepEnded(), now)]

    def fenced(self, incarnation: str, now: float) -> list[Effect]:
        """A process has ended for certain: give back what it had reserved, and close its pools, once nothing
        is read from them any more."""
        for pool in self._readers.values():
            pool.gone = pool.gone or pool.incarnation == incarnation
        hit = [m for m in self._running.values() if m.reserve.source_incarnation == incarnation]
        return [effect for migration in hit for effect in self._feed(migration, PeerFenced(), now)]

    def tick(self, now: float) -> list[Effect]:
        """Act on every deadline that has passed, and close readers that nobody has used for a while."""
        if not self._readers:
            return []  # a reader stays for a while after each migration
        due = [m for m in self._running.values() if m.deadline is not None and m.deadline <= now]
        effects = [effect for migration in due for effect in self._feed(migration, Timeout(), now)]
        in_use = [m.reserve.kv_endpoint.pool_name for m in self._running.values()]
        for pool_name, pool in list(self._readers.items()):
            if pool_name in in_use:
                pool.used_at = now
            elif pool.gone or now - pool.used_at >= READER_IDLE_S:
                del self._readers[pool_name]
                effects.append(CloseReader(pool_name))
        return effects

    def next_deadline(self) -> float | None:
        if not self._readers:
            return None
        deadlines = [m.deadline for m in self._running.values() if m.deadline is not None]
        deadlines += [pool.used_at + READER_IDLE_S for pool in self._readers.values()]
        return min(deadlines, default=None)

    def hold_until(self, now: float) -> float | None:
        """How long the next step should wait for a request that is about to join, if at all. Once per
        migration for its commit, at most ``hold_share`` of a step, and once from then on while its last
        blocks are read, LAST_READ_HOLD_S if that is longer: whoever is here already does not wait for a
        read that gets nowhere.
        """
        if not self._running:
            return None
        hold_s = self._config.hold_share * self._pace.step_s
        for migration in self._running.values():
            reading = migration.state is TargetState.COMMITTING
            if not reading and (migration.expected_at is None or migration.expected_at > now + hold_s):
                continue
            most_s = max(hold_s, LAST_READ_HOLD_S) if reading else hold_s
            until = self._holds.setdefault((migration.migration_id, reading), now + most_s)
            if until > now:
                return until
        return None

    def take_adopted(self) -> list[str]:
        """Requests that have joined since this was last asked."""
        adopted, self._adopted = self._adopted, []
        return adopted

    def check(self) -> None:
        """Raise InvariantError unless the books are in order."""
        if len(self._running) > self._config.incoming_max:
            raise InvariantError(f"{len(self._running)} migrations in at once")
        for migration in self._running.values():
            if migration.ended:
                raise InvariantError(f"ended but kept: {migration.story()}")

    def _objection(self, message: Reserve, draining: bool) -> Refused | None:
        spec, longest = message.spec, len(message.spec.prompt_tokens) + message.spec.sampling.max_tokens
        objection = self._engine.objection(spec, with_kv=message.blocks > 0)
        code, reason = None, ""
        if message.target_incarnation != self._me.incarnation:
            code, reason = RefusalCode.WRONG_TARGET, f"this is {self._me.incarnation}"
        elif draining:
            code, reason = RefusalCode.DRAINING, "the target is being drained"
        elif message.blocks > 0 and len(self._running) >= self._config.incoming_max:
            code, reason = RefusalCode.TOO_MANY, f"{len(self._running)} migrations are coming in already"
        elif message.blocks > 0 and not _same_blocks(message.kv_layout, self._me.kv_layout):
            code, reason = (
                RefusalCode.LAYOUT,
                f"blocks of {message.kv_layout} do not fit {self._me.kv_layout}",
            )
        elif longest > self._engine.max_model_len:
            code, reason = (
                RefusalCode.TOO_LONG,
                f"{longest} tokens may come, {self._engine.max_model_len} fit",
            )
        elif objection:
            code, reason = RefusalCode.ADAPTER, objection
        elif self._engine.holds(spec.request_id) or self._coming(spec.request_id):
            code, reason = RefusalCode.DUPLICATE, "the request is here or on its way here"
        return None if code is None else Refused(message.migration_id, code, reason)

    def _coming(self, request_id: str) -> bool:
        return any(m.reserve.spec.request_id == request_id for m in self._running.values())

    def _too_late(self, message: Commit | AbortMigration) -> list[Effect]:
        """For an ended or unknown migration. A commit is answered as decided, if it is known whom to
        answer."""
        migration_id = message.migration_id
        if migration_id not in self._decided:
            self._decide(migration_id, "", Denied(migration_id, "never heard of"))
        address, decision = self._decided[migration_id]
        return [Send(address, decision)] if isinstance(message, Commit) and address else []

    def _feed(self, migration: TargetMigration, event: object, now: float) -> list[Effect]:
        effects = migration.handle(event, now)
        self._settle(migration, now)
        return effects

    def _settle(self, migration: TargetMigration, now: float) -> None:
        reserve = migration.reserve
        if reserve.blocks > 0:
            pool = OpenPool(reserve.source_incarnation, now)
            self._readers.setdefault(reserve.kv_endpoint.pool_name, pool).used_at = now
        if not migration.ended:
            return
        del self._running[migration.migration_id]
        for reading in (False, True):
            self._holds.pop((migration.migration_id, reading), None)
        if migration.answer is None:
            raise InvariantError(f"ended without a decision: {migration.story()}")
        self._decide(migration.migration_id, migration.reserve.source_address, migration.answer)
        if migration.state is TargetState.ADOPTED:
            self._adopted.append(migration.reserve.spec.request_id)

    def _decide(self, migration_id: str, address: str, decision: Decision) -> None:
        self._decided.remember(migration_id, (address, decision))


def _same_blocks(ours: KvLayout, theirs: KvLayout) -> bool:
    return replace(ours, blocks=theirs.blocks) == theirs
