"""Moves that let in heads of queues that lack blocks: de-fragmentation where the whole cluster is full.

Once every instance is below the marks, balance has nowhere to move to, and yet a fifth of all memory may lie
idle: each instance has some blocks that its own head, a long prompt, finds too few. So, first, whoever waits
there goes where idle blocks are enough for it and nobody waits who came before it: one message, and it is
admitted. Then running requests leave for blocks that lie idle elsewhere, just enough of them for the head to
be admitted. (In Llumnix, OSDI'24, Algorithm 1, a blocked head is usage that makes others leave, but only to
an instance above the high mark.)

Heads of higher scheduling priority come first, and those of one priority in the order of what they lack: that
lets most in for the fewest moves. But a head that has waited ``room_patience_s`` comes before others of its
priority, oldest first, and its blocks then serve no younger one; those of a head never serve one of lower
priority. So long prompts wait longer than others, but not for ever. Called by pairing after its other moves
of a round.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceState
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.roles import suits
from llumnix.core.views import ClusterSnapshot, InstanceView, Move
from llumnix.policies.freeness import headroom

SOURCES_MAX = 32
"""Heads looked at in a round; it cannot make more than ``moves_per_round_max`` moves anyhow."""


@dataclass(slots=True)
class _Gap:
    """What of an instance's memory is of no use to its own queue: ``blocks`` that are free now beside those
    its batch needs soon, with ``moves`` to spare."""

    view: InstanceView
    blocks: float
    moves: int


def make_room(
    cluster: ClusterSnapshot, config: SchedulerConfig, busy: Collection[str], most: int
) -> list[Move]:
    """At most ``most`` moves; ``busy`` instances take part in others of this round. No instance gives and
    takes. Running requests leave only if there are gaps now for all that the head lacks; those that are over
    the bounds of a round follow in the next, if the gaps are still there."""
    plan = _Plan(cluster, config, busy, most)
    for helped in (plan.send_on, plan.make_way):
        for source in plan.lacking:
            helped(source)
    return plan.moves


class _Plan:
    """One round's moves, and the gaps they leave."""

    def __init__(
        self, cluster: ClusterSnapshot, config: SchedulerConfig, busy: Collection[str], most: int
    ) -> None:
        self.moves: list[Move] = []
        self._config = config
        self._resting = cluster.resting
        self._most = most
        self._overdue = cluster.now - config.room_patience_s
        self._gave: dict[str, int] = {}
        self._took: set[str] = set()
        serving = [
            view
            for view in cluster.instances
            if view.state is InstanceState.SERVING and view.instance_id not in busy
        ]
        lacking = [view for view in serving if view.head_missing_blocks > view.leaving_blocks]
        lacking.sort(key=self._urgency)
        self.lacking = lacking[:SOURCES_MAX]
        self._gaps = self._find_gaps(serving, cluster.closed) if self.lacking else []

    def send_on(self, source: InstanceView) -> None:
        """The first of its queue go where they are admitted at once."""
        waiting = [one for one in source.candidates if one.waiting]
        for one in sorted(
            waiting, key=lambda one: (-one.scheduling_priority, one.arrived_at, one.request_id)
        ):
            since = source.head_since + one.arrived_at - source.head_arrived_at
            first = [gap for gap in self._usable(source) if _is_first(gap.view, one, since)]
            gap = _largest(first, {gap.view.instance_id: gap.blocks for gap in first}, one)
            if gap is not None and one.request_id not in self._resting:
                self._move(one, source, gap)

    def make_way(self, source: InstanceView) -> None:
        """Running requests leave, unless one that waited has."""
        if source.instance_id not in self._gave:
            for one, gap in self._cover(source, self._usable(source)):
                if self._may_give(source) and gap.moves > 0:
                    self._move(one, source, gap)

    def _urgency(self, view: InstanceView) -> tuple[int, bool, float, str]:
        late = view.head_since < self._overdue
        within = view.head_since if late else float(view.head_missing_blocks)
        return -view.head_priority, not late, within, view.instance_id

    def _find_gaps(self, serving: Sequence[InstanceView], closed: Collection[str]) -> list[_Gap]:
        """The largest, as many as a round has moves."""
        config, gaps = self._config, []
        for view in serving:
            free = view.capacity_blocks - view.used_blocks - view.arriving_blocks
            if not view.head_missing_blocks:
                free -= view.waiting_blocks + view.placed_blocks  # they are admitted next
            reserve = headroom(view.execution_priorities, view.headroom_blocks)
            batch = view.running + view.migrating_in
            blocks = free - reserve - config.low_freeness * (batch + 1)
            moves = config.moves_per_instance_max - view.migrating_in
            if blocks > 0 and moves > 0 and view.instance_id not in closed:
                gaps.append(_Gap(view, blocks, moves))
        gaps.sort(key=lambda gap: (-gap.blocks, gap.view.instance_id))
        return gaps[: config.moves_per_round_max]

    def _usable(self, source: InstanceView) -> list[_Gap]:
        """Gaps that may serve the queue of ``source``."""
        if source.instance_id in self._took or not self._may_give(source):
            return []
        return [
            gap
            for gap in self._gaps
            if gap.moves > 0
            and gap.view.instance_id != source.instance_id
            and gap.view.instance_id not in self._gave
            and not self._is_kept(gap.view, source)
        ]

    def _is_kept(self, view: InstanceView, source: InstanceView) -> bool:
        """Whether a head waits for these blocks that comes before that of ``source`` whatever the two
        lack."""
        if not view.head_missing_blocks or view.head_priority != source.head_priority:
            return view.head_missing_blocks > 0 and view.head_priority > source.head_priority
        return view.head_since < min(self._overdue, source.head_since)

    def _may_give(self, source: InstanceView) -> bool:
        """Whether one more request may leave it in this round."""
        gave = self._gave.get(source.instance_id, 0) + source.migrating_out
        return gave < self._config.moves_per_instance_max and len(self.moves) < self._most

    def _cover(self, source: InstanceView, gaps: Sequence[_Gap]) -> list[tuple[MoveCandidate, _Gap]]:
        """Which running requests go where so that the head finds what it lacks; empty if they are not
        enough."""
        missing = source.head_missing_blocks - source.leaving_blocks
        movable = [
            one
            for one in source.candidates
            if not one.waiting and one.execution_priority <= 0 and one.request_id not in self._resting
        ]
        if not gaps or sum(one.blocks for one in movable) < missing:
            return []
        movable.sort(key=lambda one: (-one.blocks, one.request_id))
        left = {gap.view.instance_id: gap.blocks for gap in gaps}
        plan: list[tuple[MoveCandidate, _Gap]] = []
        while missing > 0:
            # The smallest that is enough by itself, else the largest that fits somewhere.
            enough = [one for one in reversed(movable) if one.blocks >= missing]
            for one in (*enough, *movable):
                gap = _largest(gaps, left, one)
                if gap is not None:
                    break
            else:
                return []
            plan.append((one, gap))
            left[gap.view.instance_id] -= one.blocks + self._config.low_freeness
            missing -= one.blocks
            movable.remove(one)
        return plan

    def _move(self, one: MoveCandidate, source: InstanceView, gap: _Gap) -> None:
        lacks = f"the head of {source.instance_id}'s queue lacks {source.head_missing_blocks} blocks"
        reason = f"{lacks}, {gap.view.instance_id} has {gap.blocks:.0f} that its own queue cannot use"
        scores = tuple((view.instance_id, view.queue_freeness) for view in (source, gap.view))
        self.moves.append(Move(one.request_id, source.instance_id, gap.view.instance_id, reason, scores))
        gap.moves -= 1
        gap.blocks -= one.blocks + self._config.low_freeness
        self._gave[source.instance_id] = self._gave.get(source.instance_id, 0) + 1
        self._took.add(gap.view.instance_id)


def _is_first(view: InstanceView, one: MoveCandidate, since: float) -> bool:
    """Whether a request that has waited since then would be the head of the queue there."""
    return not view.waiting or (-one.scheduling_priority, since) < (-view.head_priority, view.head_since)


def _largest(gaps: Sequence[_Gap], left: dict[str, float], candidate: MoveCandidate) -> _Gap | None:
    """The largest gap that the request fits in, where it can be served."""
    best: _Gap | None = None
    for gap in gaps:
        blocks = left[gap.view.instance_id]
        if blocks < candidate.blocks or (best is not None and blocks <= left[best.view.instance_id]):
            continue
        if gap.view.serves(candidate.adapter) and suits(gap.view.role, candidate.prefills):
            best = gap
    return best
