"""The target's side of one migration: a state machine that holds room, reads KV into it, and decides once.

===========  =====================  ==============  ====================================================
state        owns the KV            may decode      a timeout means
===========  =====================  ==============  ====================================================
RESERVED     source; blocks held    source          the source is gone or silent: free them (EXPIRED)
COPYING      source; a read writes  source          still reading: tell the source that we are alive
             to the held blocks
COMMITTING   source; the last       nobody, for     (none: the read returns, or fails in its own time)
             blocks are being read  the moment
LETTING_GO   source; a read that    source          (none, likewise)
             nobody wants is open
ADOPTED      target                 target          (ended)
DENIED       source                 source          (ended)
EXPIRED      source                 source          (ended)
===========  =====================  ==============  ====================================================

The decision falls exactly once, between engine steps: ADOPTED, or one of the others. From then on every
repeat of the question gets the same answer, once ended from the memory of instance/agent_incoming.py. A
waiting request brings nothing to copy: the decision about it falls when it is first heard of. Blocks
are not freed while a read may write to them: LETTING_GO waits for its return, the answer given already.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any

from llumnix.core.config import MigrationConfig
from llumnix.core.effects import Send
from llumnix.core.epochs import HOP_MAX, next_hop
from llumnix.core.errors import InvariantError, ProtocolError, TransportError
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
    Reserved,
    StageCopied,
)
from llumnix.core.messages.serving import RequestSpec
from llumnix.migration.alignment import Rhythm
from llumnix.migration.engine_sides import TakingEngine
from llumnix.migration.events import Effect, PeerFenced, ReadEnded, StartRead, StepEnded, Timeout
from llumnix.migration.pace import Pace
from llumnix.migration.story import Story


class TargetState(StrEnum):
    RESERVED = "reserved"
    COPYING = "copying"
    COMMITTING = "committing"
    LETTING_GO = "letting_go"
    ADOPTED = "adopted"
    DENIED = "denied"
    EXPIRED = "expired"


S = TargetState
ENDED = (S.ADOPTED, S.DENIED, S.EXPIRED)


class TargetMigration:
    """One migration into this instance. ``handle`` is the only entry once it has begun."""

    def __init__(
        self, reserve: Reserve, *, engine: TakingEngine, config: MigrationConfig, pace: Pace
    ) -> None:
        self.reserve = reserve
        self.state = TargetState.RESERVED
        self.deadline: float | None = None
        self.expected_at: float | None = None
        """When an announced commit should arrive, on this instance's clock."""
        self.answer: Committed | Denied | None = None
        """What was decided; None before. It never changes."""
        self._engine = engine
        self._config = config
        self._pace = pace
        self._story = Story()
        self._blocks: tuple[int, ...] = ()
        self._copied = self._present = 0  # of all; ``_blocks`` are those behind the present ones
        self._stage = 0
        self._reading = 0
        self._commit: Commit | None = None
        self._told = Rhythm(0.0, 0.0)

    @property
    def migration_id(self) -> str:
        return self.reserve.migration_id

    @property
    def ended(self) -> bool:
        """Whether nothing more can happen, so that only ``answer`` need be remembered."""
        return self.state in ENDED

    def begin(self, now: float) -> list[Effect]:
        """Hold the blocks asked for. Ends at once, with a refusal, if there is no room; and if there is
        nothing to copy, with the decision. Raises ProtocolError for what cannot be meant; nothing is held
        then."""
        self._check_reserve()
        if self.reserve.blocks == 0:
            spec = replace(self.reserve.spec, epoch=next_hop(self.reserve.spec.epoch))
            return self._adopt(spec, 0, 0.0, now)
        most = min(self.reserve.full_blocks, self.reserve.blocks)
        self._present = self._engine.keep_present(self.migration_id, self.reserve.spec, most)
        blocks = self._engine.reserve(self.migration_id, self.reserve.blocks)
        if blocks is None:
            return self._refuse(RefusalCode.NO_BLOCKS, f"no room for {self.reserve.blocks} blocks")
        self._blocks, self._copied = blocks, self._present
        if self.reserve.commit is not None:
            self._wait(now)
            return self._begin_commit(self.reserve.commit, now)
        return self._still_here(self.reserve, now)

    def handle(self, event: object, now: float) -> list[Effect]:
        """Take one event. Raises ProtocolError, with the migration's story, for one that cannot come now."""
        row = TRANSITIONS[self.state].get(type(event)) if self.state in TRANSITIONS else None
        if row is None:
            raise ProtocolError(f"{type(event).__name__} cannot come now: {self.story()}")
        action, successors = row
        before = self.state
        effects = action(self, event, now)
        if self.state not in successors:
            raise InvariantError(f"{before} to {self.state} on {type(event).__name__}: {self.story()}")
        if not isinstance(event, StepEnded):
            self._story.note(event, self.state, now)
        return effects

    def story(self) -> str:
        """What this migration has been through, for errors and logs."""
        spec, source = self.reserve.spec, self.reserve.source_id
        head = f"migration {self.migration_id} of {spec.request_id} from {source}, {self.state}"
        return f"{head} with {self._copied} blocks copied: {self._story}"

    def _still_here(self, event: object, now: float) -> list[Effect]:
        self._wait(now)
        return [self._reserved(now)]

    def _keep_in_step(self, event: StepEnded, now: float) -> list[Effect]:
        """Right before a step: the source must not go by a rhythm that is no longer ours."""
        if self._told.step_s > 0 and not self._told.drifted(now):
            return []
        return [self._reserved(now)]

    def _read_stage(self, event: CopyStage, now: float) -> list[Effect]:
        if event.stage <= self._stage:
            return self._repeat_stage(event, now)
        if event.stage != self._stage + 1 or not event.source_blocks:
            raise ProtocolError(f"stage {event.stage} after {self._stage}: {self.story()}")
        total = max(event.reserve_blocks, self._copied + len(event.source_blocks))
        if not self._grow(total):
            return self._refuse(RefusalCode.NO_BLOCKS, f"no room for {total} blocks")
        self._stage = event.stage
        self.state = TargetState.COPYING
        # Half the source's patience: it hears from us in time however long the copy takes.
        self.deadline = now + self._config.answer_timeout_s / 2
        return [self._start_read(event.source_blocks, final=False)]

    def _repeat_stage(self, event: CopyStage, now: float) -> list[Effect]:
        if event.stage != self._stage:
            return []
        return [self._copied_stage(0.0, now)]

    def _reading_still(self, event: object, now: float) -> list[Effect]:
        self.deadline = now + self._config.answer_timeout_s / 2
        return [self._reserved(now)]

    def _stage_read(self, event: ReadEnded, now: float) -> list[Effect]:
        if isinstance(event.outcome, TransportError):
            return self._refuse(RefusalCode.UNREADABLE, str(event.outcome))
        self._copied += self._reading
        self.state = TargetState.RESERVED
        self._wait(now)
        return [self._copied_stage(event.outcome.duration_s, now)]

    def _expect_commit(self, event: CommitSoon, now: float) -> list[Effect]:
        self.expected_at = now + event.in_s
        self._wait(now)
        return []

    def _begin_commit(self, event: Commit, now: float) -> list[Effect]:
        total = self._copied + len(event.source_blocks)
        self._check_commit(event, total)
        if not self._grow(total):
            return self._deny(f"no room for {total} blocks")
        self._commit, self.expected_at = event, None
        if not event.source_blocks:
            return self._take_over(event, 0.0, now)
        self.state, self.deadline = TargetState.COMMITTING, None
        self._stage += 1
        return [self._start_read(event.source_blocks, final=True)]

    def _check_reserve(self) -> None:
        reserve = self.reserve
        if reserve.blocks < 0 or reserve.full_blocks < 0 or reserve.spec.epoch & HOP_MAX == HOP_MAX:
            raise ProtocolError(f"{reserve.blocks} blocks, {reserve.full_blocks} full: {self.story()}")
        if reserve.commit is not None:
            if reserve.full_blocks:
                raise ProtocolError(f"a commit before it is known what is present: {self.story()}")
            self._check_commit(reserve.commit, len(reserve.commit.source_blocks))

    def _check_commit(self, event: Commit, total: int) -> None:
        spec = self.reserve.spec
        tokens = len(spec.prompt_tokens) + event.first_index + len(event.output_tokens)
        needed = -(-event.computed_tokens // self.reserve.kv_layout.block_size)
        if event.first_index != len(spec.output_tokens) or event.epoch != next_hop(spec.epoch):
            raise ProtocolError(f"commit does not continue the reserved request: {self.story()}")
        if needed != total or not 0 <= event.computed_tokens < tokens:
            raise ProtocolError(f"commit of {event.computed_tokens} tokens in {total} blocks: {self.story()}")

    def _last_read(self, event: ReadEnded, now: float) -> list[Effect]:
        if isinstance(event.outcome, TransportError):
            return self._refuse(RefusalCode.UNREADABLE, str(event.outcome))
        if self._commit is None:
            raise InvariantError(f"committing without a commit: {self.story()}")
        return self._take_over(self._commit, event.outcome.duration_s, now)

    def _take_over(self, commit: Commit, copy_s: float, now: float) -> list[Effect]:
        spec = replace(
            self.reserve.spec,
            epoch=commit.epoch,
            output_tokens=self.reserve.spec.output_tokens + commit.output_tokens,
            waited_s=commit.waited_s,
        )
        return self._adopt(spec, commit.computed_tokens, copy_s, now)

    def _adopt(self, spec: RequestSpec, computed_tokens: int, copy_s: float, now: float) -> list[Effect]:
        refusal = self._engine.adopt(self.migration_id, spec, computed_tokens, now)
        if refusal is not None:
            return self._deny(refusal.reason)
        self.answer = Committed(self.migration_id, spec.epoch, copy_s)
        self._end(S.ADOPTED)
        return [self._send(self.answer)]

    def _query(self, event: QueryCommit, now: float) -> list[Effect]:
        return self._deny("asked before it had arrived")

    def _query_while_reading(self, event: QueryCommit, now: float) -> list[Effect]:
        return self._deny_while_reading("asked before it had arrived")

    def _cancel(self, event: object, now: float) -> list[Effect]:
        """The source forgot it or died: nobody wants an answer, but a late commit must not find a way in."""
        self.answer = Denied(self.migration_id, "the source gave it up")
        self._end(S.DENIED)
        return []

    def _cancel_while_reading(self, event: object, now: float) -> list[Effect]:
        self.answer = Denied(self.migration_id, "the source gave it up")
        self.state, self.deadline = TargetState.LETTING_GO, None
        return []

    def _expire(self, event: object, now: float) -> list[Effect]:
        self.answer = Denied(self.migration_id, f"nothing heard for {self._config.reservation_s:g} s")
        self._end(S.EXPIRED)
        return [self._send(self.answer)]

    def _repeat_answer(self, event: object, now: float) -> list[Effect]:
        return [] if self.answer is None else [self._send(self.answer)]

    def _read_let_go(self, event: object, now: float) -> list[Effect]:
        self._end(S.DENIED)
        return []

    def _ignore(self, event: object, now: float) -> list[Effect]:
        """A repeat, a message overtaken by a later one, or nothing to this state."""
        return []

    def _deny(self, reason: str) -> list[Effect]:
        self.answer = Denied(self.migration_id, reason)
        self._end(S.DENIED)
        return [self._send(self.answer)]

    def _deny_while_reading(self, reason: str) -> list[Effect]:
        self.answer = Denied(self.migration_id, reason)
        self.state, self.deadline = TargetState.LETTING_GO, None
        return [self._send(self.answer)]

    def _refuse(self, code: RefusalCode, reason: str) -> list[Effect]:
        self.answer = Denied(self.migration_id, reason)
        self._end(S.DENIED)
        return [self._send(Refused(self.migration_id, code, reason))]

    def _end(self, state: TargetState) -> None:
        self.state, self.deadline, self.expected_at = state, None, None
        if state is not S.ADOPTED:
            self._engine.cancel_reservation(self.migration_id)

    def _grow(self, total: int) -> bool:
        if total > self._present + len(self._blocks):
            blocks = self._engine.reserve(self.migration_id, total)
            if blocks is None:
                return False
            self._blocks = blocks
        return True

    def _start_read(self, source_blocks: tuple[int, ...], *, final: bool) -> StartRead:
        self._reading = len(source_blocks)
        first = self._copied - self._present
        target_blocks = self._blocks[first : first + len(source_blocks)]
        endpoint = self.reserve.kv_endpoint
        rests = not (final or self.reserve.swapped)
        where = (endpoint, source_blocks, target_blocks)
        return StartRead(self.migration_id, self._stage, *where, final, rests)

    def _reserved(self, now: float) -> Send:
        times = (self._config.reservation_s, self._tell_step_s(now))
        return self._send(Reserved(self.migration_id, *times, self._present))

    def _copied_stage(self, copy_s: float, now: float) -> Send:
        return self._send(StageCopied(self.migration_id, self._stage, copy_s, self._tell_step_s(now)))

    def _tell_step_s(self, now: float) -> float:
        self._told = Rhythm(now, self._pace.step_s if self._engine.has_work() else 0.0)
        return self._told.step_s

    def _wait(self, now: float) -> None:
        self.deadline = now + self._config.reservation_s

    def _send(self, message: object) -> Send:
        return Send(self.reserve.source_address, message)


M = TargetMigration
Action = Callable[[TargetMigration, Any, float], list[Effect]]
Rows = Mapping[type, tuple[Action, tuple[TargetState, ...]]]

TRANSITIONS: Mapping[TargetState, Rows] = {
    S.RESERVED: {
        StepEnded: (M._keep_in_step, (S.RESERVED,)),
        Reserve: (M._still_here, (S.RESERVED,)),
        CopyStage: (M._read_stage, (S.RESERVED, S.COPYING, S.DENIED)),
        CommitSoon: (M._expect_commit, (S.RESERVED,)),
        Commit: (M._begin_commit, (S.COMMITTING, S.ADOPTED, S.DENIED)),
        QueryCommit: (M._query, (S.DENIED,)),
        AbortMigration: (M._cancel, (S.DENIED,)),
        PeerFenced: (M._cancel, (S.DENIED,)),
        Timeout: (M._expire, (S.EXPIRED,)),
    },
    S.COPYING: {
        StepEnded: (M._ignore, (S.COPYING,)),
        Reserve: (M._reading_still, (S.COPYING,)),
        CopyStage: (M._ignore, (S.COPYING,)),
        CommitSoon: (M._ignore, (S.COPYING,)),
        ReadEnded: (M._stage_read, (S.RESERVED, S.DENIED)),
        QueryCommit: (M._query_while_reading, (S.LETTING_GO,)),
        AbortMigration: (M._cancel_while_reading, (S.LETTING_GO,)),
        PeerFenced: (M._cancel_while_reading, (S.LETTING_GO,)),
        Timeout: (M._reading_still, (S.COPYING,)),
    },
    S.COMMITTING: {
        StepEnded: (M._ignore, (S.COMMITTING,)),
        Reserve: (M._ignore, (S.COMMITTING,)),
        CopyStage: (M._ignore, (S.COMMITTING,)),
        CommitSoon: (M._ignore, (S.COMMITTING,)),
        Commit: (M._ignore, (S.COMMITTING,)),
        ReadEnded: (M._last_read, (S.ADOPTED, S.DENIED)),
        QueryCommit: (M._query_while_reading, (S.LETTING_GO,)),
        AbortMigration: (M._cancel_while_reading, (S.LETTING_GO,)),
        PeerFenced: (M._ignore, (S.COMMITTING,)),
    },
    S.LETTING_GO: {
        StepEnded: (M._ignore, (S.LETTING_GO,)),
        Reserve: (M._ignore, (S.LETTING_GO,)),
        CopyStage: (M._ignore, (S.LETTING_GO,)),
        CommitSoon: (M._ignore, (S.LETTING_GO,)),
        Commit: (M._repeat_answer, (S.LETTING_GO,)),
        QueryCommit: (M._repeat_answer, (S.LETTING_GO,)),
        AbortMigration: (M._ignore, (S.LETTING_GO,)),
        PeerFenced: (M._ignore, (S.LETTING_GO,)),
        ReadEnded: (M._read_let_go, (S.DENIED,)),
    },
}
"""State and event to the action taken and the states it may lead to. What is not here cannot come."""
