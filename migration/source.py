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
RESUMED           source            source, two hops on    (ended)
ABORTED, REFUSED  source            source, as before      (ended)
================  ================  =====================  ========================================

READY means that all full blocks but the newest are over; the request runs on for the few steps after which
leaving costs least (alignment.py), the last of them announced to the target. A waiting request has nothing to
copy: it leaves with the Reserve, which then is its commit. A swapped-out one, whose KV the target reads from
this side's host memory, is never READY: nothing is computed meanwhile, so it goes once its KV is over. Should
it be swapped in before, or lose its KV, its kv_version has changed, and the migration is given up. If copying
is known to take longer than computing again, it goes without KV; so it does if the target has no place for
that, but by an exchange of its own: a repeat of that refusal must not be taken for the answer to its commit.

The source resumes a request whose commit it has sent in two cases only. Denied or refused: the target never
had it, so the source's own epoch still stands. Fenced: the target may have decoded at the next hop before it
died, so the source takes the one after. It lets go of the request unanswered if its client is gone (an abort
of all hops of its generation), if a newer generation has come, or if ASKS_MAX questions brought no answer: a
target may die unheard of. Nothing is lost: the frontend, told that nobody holds it, goes on elsewhere.

Driven by instance/agent_outgoing.py, between engine steps only.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from llumnix.core.config import MigrationConfig
from llumnix.core.effects import Send
from llumnix.core.epochs import HOP_MAX, next_hop
from llumnix.core.errors import InvariantError, ProtocolError
from llumnix.core.messages.control import InstanceHello, MigrateOrder, MigrationOutcome
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
from llumnix.core.messages.serving import Abort, Moved, RequestSpec
from llumnix.migration.alignment import STEPS_MAX, Rhythm, steps_to_wait
from llumnix.migration.copying import WITHOUT_KV, Copying
from llumnix.migration.engine_sides import GivingEngine, Movable
from llumnix.migration.events import ClientAbort, PeerFenced, StepEnded, Superseded, Timeout
from llumnix.migration.pace import CopySpeeds, Pace
from llumnix.migration.story import Story
from llumnix.migration.tally import Tally

LAST_FULL_BLOCKS = 1
"""Full blocks left that are not worth a stage of their own: the commit reads them with the partial one."""

ASKS_MAX = 12
"""Unanswered questions about a commit after which its request is left to its frontend."""


class SourceState(StrEnum):
    RESERVING = "reserving"
    COPYING = "copying"
    READY = "ready"
    COMMITTING = "committing"
    COMMIT_UNKNOWN = "commit_unknown"
    COMMITTED = "committed"
    RESUMED = "resumed"
    ABORTED = "aborted"
    REFUSED = "refused"


S = SourceState
ENDED = (S.COMMITTED, S.RESUMED, S.ABORTED, S.REFUSED)
UNDECIDED = (S.COMMITTING, S.COMMIT_UNKNOWN)


class SourceMigration:
    """One migration out of this instance. ``handle`` is the only entry once it has begun."""

    def __init__(
        self,
        order: MigrateOrder,
        me: InstanceHello,
        *,
        engine: GivingEngine,
        config: MigrationConfig,
        pace: Pace,
        speeds: CopySpeeds,
        manager_address: str,
    ) -> None:
        self.order = order
        self.migration_id = order.migration_id
        """Of the exchange with the target; the manager knows the order's."""
        self.state = SourceState.RESERVING
        self.deadline: float | None = None
        self.rhythm: Rhythm | None = None
        """The target's steps, as last heard; set by whoever knows when the message arrived."""
        self.spec: RequestSpec
        self._me, self._engine, self._config = me, engine, config
        self._manager_address = manager_address
        self._story = Story()
        self._copying: Copying
        self._tally = Tally(0.0)
        self._pace, self._speeds = pace, speeds
        self._steps_left, self._asks_left = STEPS_MAX, ASKS_MAX
        self._announced = False

    @property
    def ended(self) -> bool:
        """Whether nothing more can happen, so that the agent may forget this migration."""
        return self.state in ENDED

    @property
    def undecided(self) -> bool:
        """Whether a commit is on its way: the request is in no batch here, and may be in one elsewhere."""
        return self.state in UNDECIDED

    @property
    def moved(self) -> Moved:
        """What the request's frontend is told once the target has it."""
        return Moved(self.order.request_id, next_hop(self.spec.epoch), self.order.target_id)

    def begin(self, now: float) -> list[Send]:
        """Ask the target for room. The request must be movable and have two more hops in its epoch."""
        movable = self._engine.movable(self.order.request_id)
        if movable is None:
            raise InvariantError(f"not movable: {self.story()}")
        self.spec = self._engine.spec_of(self.order.request_id, now)
        self._tally = Tally(now)
        self._copying = Copying(self._me, self.order.target_incarnation, self._speeds, movable, now)
        return self._reserve(movable, now)

    def _reserve(self, movable: Movable, now: float) -> list[Send]:
        copying = self._copying
        if copying.endpoint is None:
            self._take_out(now)
        reserve = Reserve(
            migration_id=self.migration_id,
            source_id=self._me.instance_id,
            source_incarnation=self._me.incarnation,
            source_address=self._me.address,
            target_incarnation=self.order.target_incarnation,
            kv_endpoint=copying.endpoint or self._me.kv_endpoint,
            kv_layout=self._me.kv_layout,
            spec=self.spec,
            blocks=0 if copying.endpoint is None else copying.blocks_wanted(movable, self.spec),
            swapped=copying.swapped,
            full_blocks=copying.full_blocks,
        )
        self._wait(now)
        return [self._send(reserve)]

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

    def story(self) -> str:
        """What this migration has been through, for errors and logs."""
        order = self.order
        head = f"migration {order.migration_id} of {order.request_id} to {order.target_id}, {self.state}"
        return f"{head} after {self._tally.stages} stages: {self._story}"

    # Before the commit: the request decodes here.

    def _advance(self, event: object, now: float) -> list[Send]:
        """Room is there, or a stage is done: start the next stage, or get ready to hand over."""
        copying = self._copying
        if isinstance(event, StageCopied):
            if event.stage != self._tally.stages:
                return self._ignore(event, now)
            copying.stage_ended(event, now)
        elif isinstance(event, Reserved) and not copying.skip(event.present_blocks):
            return self._give_up(f"the target says it has {event.present_blocks} blocks", now)
        movable = self._engine.movable(self.order.request_id)
        lost = copying.lost(movable)
        if movable is None or lost:
            return self._give_up(lost, now)
        if copying.fresh(movable) > LAST_FULL_BLOCKS and self._tally.stages < self._config.stages_max:
            return self._begin_stage(movable, now)
        if movable.lagging:  # look again after a step
            self.state = SourceState.COPYING
            self._wait(now)
            return []
        if self._config.hold_share == 0 or copying.swapped:
            return self._hand_over(movable, now)
        self.state = SourceState.READY
        self._wait(now)
        return self._leave_in_time(movable, now)

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
        current = self._engine.spec_of(self.order.request_id, now)
        self._take_out(now)
        last = self._copying.last_blocks(movable)
        self._tally.blocks += len(last)
        self._wait(now)
        first_index = len(self.spec.output_tokens)
        fresh, epoch = current.output_tokens[first_index:], next_hop(self.spec.epoch)
        where = (last, movable.computed_tokens)
        commit = Commit(self.migration_id, epoch, *where, first_index, fresh, current.waited_s)
        return [self._send(commit)]

    def _give_up(self, reason: str, now: float) -> list[Send]:
        abort = AbortMigration(self.migration_id, reason)
        return [self._send(abort), *self._end(S.ABORTED, reason, now)]

    def _no_answer(self, event: object, now: float) -> list[Send]:
        return self._give_up(f"no answer within {self._config.answer_timeout_s:g} s, {self.state}", now)

    def _keep_waiting(self, event: object, now: float) -> list[Send]:
        """The target is alive and still at it."""
        self._wait(now)
        return []

    def _target_said_no(self, event: Refused | Denied, now: float) -> list[Send]:
        if isinstance(event, Denied):
            return self._end(S.ABORTED, event.reason, now)
        return self._end(S.REFUSED, f"{event.code}: {event.reason}", now)

    def _no_place(self, event: Refused, now: float) -> list[Send]:
        """Swapped-out, it may still be queued there, if it has not begun to run here meanwhile."""
        movable = self._engine.movable(self.order.request_id)
        if movable is None or not self._copying.leaves_kv(event.code, movable):
            return self._target_said_no(event, now)
        self.migration_id += WITHOUT_KV
        return self._reserve(movable, now)

    def _target_died(self, event: object, now: float) -> list[Send]:
        return self._end(S.ABORTED, "the target has ended", now)

    def _abort_here(self, event: ClientAbort, now: float) -> list[Send]:
        stopped = self._engine.abort(self.order.request_id, event.epoch)
        return self._give_up("its client stopped the request", now) if stopped else []

    def _superseded_early(self, event: object, now: float) -> list[Send]:
        return self._give_up("the request was submitted anew", now)

    # After the commit was sent: the request is in no batch here.

    def _committed(self, event: Committed, now: float) -> list[Send]:
        epoch = next_hop(self.spec.epoch)
        if event.epoch != epoch:
            raise ProtocolError(f"Committed at epoch {event.epoch}, expected {epoch}: {self.story()}")
        self._engine.release(self.order.request_id)
        told = Send(self.spec.frontend_address, self.moved)
        return [told, *self._end(S.COMMITTED, self.order.reason, now)]

    def _not_taken(self, event: Refused | Denied, now: float) -> list[Send]:
        self._engine.put_back(self.order.request_id, self.spec.epoch)
        return self._target_said_no(event, now)

    def _resume(self, event: object, now: float) -> list[Send]:
        self._engine.put_back(self.order.request_id, next_hop(self.spec.epoch, 2))
        return self._end(S.RESUMED, "the target ended before it answered the commit", now)

    def _ask(self, event: object, now: float) -> list[Send]:
        if self._asks_left == 0:
            self._engine.release(self.order.request_id)
            return self._give_up("the target never answered the commit", now)
        self._asks_left -= 1
        self.state = SourceState.COMMIT_UNKNOWN
        self._wait(now)
        return [self._send(QueryCommit(self.migration_id, self._me.address))]

    def _abort_everywhere(self, event: ClientAbort, now: float) -> list[Send]:
        """One that only tells a stale owner to stop says nothing about the next, and changes nothing."""
        if event.epoch < self.spec.epoch | HOP_MAX:
            return []
        self._engine.release(self.order.request_id)
        there = self._send(Abort(self.order.request_id, event.epoch))
        return [*self._give_up("its client stopped the request", now), there]

    def _superseded_late(self, event: object, now: float) -> list[Send]:
        self._engine.release(self.order.request_id)
        return self._give_up("the request was submitted anew", now)

    def _ignore(self, event: object, now: float) -> list[Send]:
        """A repeat, or an answer overtaken by a later one."""
        return []

    def _take_out(self, now: float) -> None:
        """From now on the target decides."""
        self._engine.take_out(self.order.request_id)
        self.state, self._tally.taken_out_at = S.COMMITTING, now

    def _wait(self, now: float) -> None:
        self.deadline = now + self._config.answer_timeout_s

    def _send(self, message: object) -> Send:
        return Send(self.order.target_address, message)

    def _end(self, state: SourceState, reason: str, now: float) -> list[Send]:
        """Tell the manager how it ended."""
        self.state, self.deadline = state, None
        ended = self._tally.ended(self.order, self._me, MigrationOutcome(state.value), reason, now)
        return [Send(self._manager_address, ended)]


M = SourceMigration
Action = Callable[[SourceMigration, Any, float], list[Send]]
Rows = Mapping[type, tuple[Action, tuple[SourceState, ...]]]

EARLY: Rows = {
    StepEnded: (M._step_ended, (S.RESERVING, S.COPYING, S.ABORTED)),
    Timeout: (M._no_answer, (S.ABORTED,)),
    Refused: (M._target_said_no, (S.REFUSED,)),
    Denied: (M._target_said_no, (S.ABORTED,)),
    PeerFenced: (M._target_died, (S.ABORTED,)),
    ClientAbort: (M._abort_here, (S.RESERVING, S.COPYING, S.READY, S.ABORTED)),
    Superseded: (M._superseded_early, (S.ABORTED,)),
}
"""What is the same in every state before the commit."""

LATE: Rows = {
    Committed: (M._committed, (S.COMMITTED,)),
    Denied: (M._not_taken, (S.ABORTED,)),
    Refused: (M._not_taken, (S.REFUSED,)),
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
        Refused: (M._no_place, (S.COMMITTING, S.REFUSED)),
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
