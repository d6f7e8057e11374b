"""The source's side of one migration: a state machine that keeps a request alive whatever the network does.

================  ================  =====================  ========================================
state             owns the KV       may decode             a timeout means
================  ================  =====================  ========================================
RESERVING         source            source                 no answer: give up, nothing has happened
COPYING           source            source                 the target is stuck or gone: give up
READY             source            source                 no step came to hand over after: give up
COMMITTING        source            target, once it adopts not a no: ask (COMMIT_UNKNOWN)
COMMIT_UNKNOWN    source or target  target, if it adopted  ask again, ASKS_MAX times; then let it go
COMMITTED         target            target                 (ended)
RESUMED           source            source, RESUME_HOPS on (ended)
ABORTED, REFUSED  source            source, as before      (ended)
================  ================  =====================  ========================================

READY means that all full blocks but the newest are over; the request runs on for the few steps after which
leaving costs least (alignment.py), the last of them announced to the target. A waiting request has nothing to
copy: it leaves with the Reserve, which then is its commit. A swapped-out one, whose KV the target reads from
this side's host memory, is never READY: nothing is computed meanwhile, so it goes once its KV is over. As
each message waits for a step of the other side to end, there are as few as can be: the first stage is asked
for with the Reserve, and if the target is known to read it all quickly, the Reserve is the commit, too.
Should it be swapped in before, or lose its KV, its kv_version has changed: the migration ends. If copying
is known to take longer than computing again, it goes without KV; so it does if the target has no place for
that or cannot read it, but by an exchange of its own: a repeat of that refusal must not be taken for the
answer to its commit.

What the source does once its commit is sent: source_commit.py.

Driven by instance/agent_outgoing.py, between engine steps only.
"""

from collections.abc import Callable, Mapping
from typing import Any

from llumnix.core.effects import Send
from llumnix.core.errors import InvariantError, ProtocolError
from llumnix.core.messages.migration import (
    CommitSoon,
    Committed,
    CopyStage,
    Denied,
    Refused,
    Reserved,
    StageCopied,
)
from llumnix.migration.alignment import STEPS_MAX, steps_to_wait
from llumnix.migration.copying import Copying
from llumnix.migration.engine_sides import Movable
from llumnix.migration.events import ClientAbort, PeerFenced, StepEnded, Superseded, Timeout
from llumnix.migration.source_commit import SentCommit
from llumnix.migration.source_state import UNDECIDED, S, SourceState
from llumnix.migration.tally import Tally

LAST_FULL_BLOCKS = 1
"""Full blocks left that are not worth a stage of their own: the commit reads them with the partial one."""


class SourceMigration(SentCommit):
    """One migration out of this instance. ``handle`` is the only entry once it has begun."""

    _steps_left = STEPS_MAX
    _announced = False

    def begin(self, now: float) -> list[Send]:
        """Ask the target for room. The request must be movable, its epoch have RESUME_HOPS hops left."""
        movable = self._engine.movable(self.order.request_id)
        if movable is None:
            raise InvariantError(f"not movable: {self.story()}")
        self.spec = self._engine.spec_of(self.order.request_id, now)
        self._tally = Tally(now)
        self._copying = Copying(self._me, self.order.target_incarnation, self._speeds, movable, now)
        effects = self._reserve(movable, now)
        still = self.state is S.RESERVING and self._copying.swapped and not movable.lagging
        return [*effects, *self._begin_stage(movable, now)] if still and self._staged(movable) else effects

    def handle(self, event: object, now: float) -> list[Send]:
        """Take one event. Raises ProtocolError, with the migration's story, for one that cannot come now."""
        row = TRANSITIONS[self.state].get(type(event)) if self.state in TRANSITIONS else None
        if row is None:
            raise ProtocolError(f"{type(event).__name__} cannot come now: {self.story()}")
        action, successors = row
        before = self.state
        effects = action(self, event, now)
        if not isinstance(event, StepEnded) or self.state is not before:
            self._story.note(event, self.state, now)
        if self.state not in successors:
            raise InvariantError(f"{before} cannot lead there: {self.story()}")
        return effects

    def _advance(self, event: object, now: float) -> list[Send]:
        """Room is there, or a stage is done: start the next stage, or get ready to hand over."""
        copying = self._copying
        if isinstance(event, StageCopied):
            if event.stage != self._tally.stages:
                return self._ignore(event, now)
            copying.stage_ended(event, now)
        elif isinstance(event, Reserved):
            objection = self._target_has(event.present_blocks)
            if objection:
                return self._give_up(objection, now)
        movable = self._engine.movable(self.order.request_id)
        lost = copying.lost(movable)
        if movable is None or lost:
            return self._give_up(lost, now)
        if self._staged(movable):
            return self._begin_stage(movable, now)
        if movable.lagging:  # look again after a step
            self.state = SourceState.COPYING
            self._wait(now)
            return []
        if self._config.hold_share == 0 or copying.swapped:
            return self._hand_over(movable, now)
        self.state = SourceState.READY
        return self._leave_in_time(movable, now)

    def _target_has(self, present_blocks: int) -> str:
        """It has room, and so many leading blocks already: have the others where it can read them. Returns
        why that cannot be; empty if it can."""
        if not self._copying.skip(present_blocks):
            return f"the target says it has {present_blocks} blocks"
        return self._engine.begin_move(self.order.request_id, present_blocks)

    def _staged(self, movable: Movable) -> bool:
        """Whether what is full by now is to be copied before the commit."""
        fresh = self._copying.fresh(movable)
        return fresh > LAST_FULL_BLOCKS and self._tally.stages < self._config.stages_max

    def _begin_stage(self, movable: Movable, now: float) -> list[Send]:
        wanted = self._copying.blocks_wanted(movable, self.spec)
        blocks = self._copying.begin_stage(movable)
        self._tally.stages += 1
        self._tally.blocks += len(blocks)
        self.state = SourceState.COPYING
        self._wait(now)
        return [self._send(CopyStage(self.migration_id, self._tally.stages, blocks, wanted))]

    def _leave_in_time(self, movable: Movable, now: float) -> list[Send]:
        """READY, between steps: go now, or say so if the request is to leave after the next one."""
        share, most = self._config.hold_share, self._steps_left
        steps = steps_to_wait(now, self._pace.step_s, self.rhythm, hold_share=share, steps_max=most)
        if steps == 0:
            return self._hand_over(movable, now)
        self._wait(now)
        self._steps_left -= 1
        self._announced = steps == 1
        return [self._send(CommitSoon(self.migration_id, self._pace.step_s))] if self._announced else []

    def _step_ended(self, event: StepEnded, now: float) -> list[Send]:
        """A step may have finished the request or given its KV up; if not, it may be the moment to go."""
        movable = self._engine.movable(self.order.request_id)
        lost = self._copying.lost(movable)
        if movable is None or lost:
            return self._give_up(lost, now)
        if self.state is SourceState.COPYING and self._copying.under_way == 0:
            return self._advance(event, now)
        if self.state is not SourceState.READY:
            return []
        return self._hand_over(movable, now) if self._announced else self._leave_in_time(movable, now)

    def _hand_over(self, movable: Movable, now: float) -> list[Send]:
        commit = self._commit(movable, now)
        self._wait(now)
        return [self._send(commit)]

    def _no_answer(self, event: object, now: float) -> list[Send]:
        return self._give_up(f"no answer within {self._config.answer_timeout_s:g} s, {self.state}", now)

    def _keep_waiting(self, event: object, now: float) -> list[Send]:
        """The target is alive and still at it."""
        self._wait(now)
        return []

    def _target_died(self, event: object, now: float) -> list[Send]:
        return self._end(S.ABORTED, "the target has ended", now)

    def _abort_here(self, event: ClientAbort, now: float) -> list[Send]:
        stopped = self._engine.abort(self.order.request_id, event.epoch)
        return self._give_up("its client stopped the request", now) if stopped else []

    def _superseded_early(self, event: object, now: float) -> list[Send]:
        return self._give_up("the request was submitted anew", now)


M = SourceMigration
Action = Callable[[SourceMigration, Any, float], list[Send]]
Rows = Mapping[type, tuple[Action, tuple[SourceState, ...]]]

EARLY: Rows = {
    StepEnded: (M._step_ended, (S.RESERVING, S.COPYING, S.ABORTED)),
    Timeout: (M._no_answer, (S.ABORTED,)),
    Refused: (M._refused, (S.COMMITTING, S.REFUSED, S.ABORTED)),
    Denied: (M._target_said_no, (S.ABORTED,)),
    PeerFenced: (M._target_died, (S.ABORTED,)),
    ClientAbort: (M._abort_here, (S.RESERVING, S.COPYING, S.READY, S.ABORTED)),
    Superseded: (M._superseded_early, (S.ABORTED,)),
}
"""What is the same in every state before the commit."""

LATE: Rows = {
    Committed: (M._committed, (S.COMMITTED,)),
    Denied: (M._denied, (S.ABORTED,)),
    Refused: (M._commit_refused, (S.COMMITTING, S.REFUSED, S.ABORTED)),
    PeerFenced: (M._resume, (S.RESUMED,)),
    Timeout: (M._ask, (S.COMMIT_UNKNOWN, S.ABORTED)),
    ClientAbort: (M._abort_everywhere, (*UNDECIDED, S.ABORTED)),
    Superseded: (M._superseded_late, (S.ABORTED,)),
    Reserved: (M._ignore, UNDECIDED),
    StageCopied: (M._ignore, UNDECIDED),
    StepEnded: (M._ignore, UNDECIDED),
}
"""What is the same in both states after it."""

TRANSITIONS: Mapping[SourceState, Rows] = {
    S.RESERVING: {
        **EARLY,
        Reserved: (M._advance, (S.COPYING, S.READY, S.COMMITTING, S.ABORTED)),
    },
    S.COPYING: {
        **EARLY,
        StepEnded: (M._step_ended, (S.COPYING, S.READY, S.COMMITTING, S.ABORTED)),
        Reserved: (M._keep_waiting, (S.COPYING,)),
        StageCopied: (M._advance, (S.COPYING, S.READY, S.COMMITTING, S.ABORTED)),
    },
    S.READY: {
        **EARLY,
        Reserved: (M._ignore, (S.READY,)),
        StageCopied: (M._ignore, (S.READY,)),
        StepEnded: (M._step_ended, (S.READY, S.COMMITTING, S.ABORTED)),
    },
    S.COMMITTING: LATE,
    S.COMMIT_UNKNOWN: LATE,
}
"""State and event to the action taken and the states it may lead to. What is not here cannot come."""
