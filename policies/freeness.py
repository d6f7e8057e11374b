"""Freeness: how free an instance is, in decode steps that its batch could still run. Higher is freer.

Virtual usage follows Llumnix (OSDI'24), Algorithm 1. A running request uses its blocks; the head of the queue
uses what its prefill needs, so an instance that cannot admit it looks full and pushes others away
(defragmentation); each execution priority above 0 that runs keeps ``headroom_blocks`` free beside it; an
instance being drained hosts a fake request of infinite size. Freeness is what is left of the capacity, per
request of the batch.

What the manager knows to be on its way counts as if it were there: unconfirmed placements and arriving
migrations.

``queue_freeness`` differs in two points, for choosing where a newcomer goes and whether a move pays. All of
the queue counts, not the head alone. Once it is negative it is no longer divided by the batch: a large batch
would hide a long queue, and "steps left" has no meaning when there are none.

Called by the cluster view for every instance that changed, and by pairing to see an instance after a move.
"""

from math import ceil, inf
from typing import NamedTuple

from llumnix.core.messages.control import InstanceState
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.views import InstanceView

Priorities = tuple[tuple[int, int], ...]


class Load(NamedTuple):
    """What freeness depends on. ``used_blocks`` include what arrives and exclude what leaves;
    ``queued_blocks`` is the demand of all ``waiting`` requests, ``head_blocks`` its first part; ``placed_*``
    come on top."""

    capacity_blocks: int
    used_blocks: int
    head_blocks: int
    queued_blocks: int
    placed_blocks: int
    batch: int
    waiting: int
    placed_requests: int
    priorities: Priorities
    draining: bool

    @classmethod
    def of(cls, view: InstanceView) -> "Load":
        """The load a view stands for."""
        return cls(
            view.capacity_blocks,
            max(0, view.used_blocks + view.arriving_blocks - view.leaving_blocks),
            view.head_blocks,
            view.waiting_blocks,
            view.placed_blocks,
            max(0, view.running + view.migrating_in - view.migrating_out),
            view.waiting,
            view.placed_requests,
            view.execution_priorities,
            view.state is InstanceState.DRAINING,
        )

    @property
    def free_blocks(self) -> int:
        """Blocks left once all queued and placed demand is met; negative if it cannot be."""
        return self.capacity_blocks - self.used_blocks - self.queued_blocks - self.placed_blocks

    def freeness(self, headroom_blocks: int) -> float:
        """Algorithm 1; ``-inf`` while draining."""
        if self.draining:
            return -inf
        free = self.capacity_blocks - self.used_blocks - self.head_blocks - self.placed_blocks
        return (free - headroom(self.priorities, headroom_blocks)) / (self.batch + self.placed_requests or 1)

    def queue_freeness(self, headroom_blocks: int) -> float:
        """The same with the whole queue counted, and in blocks where negative."""
        if self.draining:
            return -inf
        free = self.capacity_blocks - self.used_blocks - self.queued_blocks - self.placed_blocks
        free -= headroom(self.priorities, headroom_blocks)
        return free / (self.batch + self.waiting + self.placed_requests or 1) if free > 0 else float(free)

    def demand(self, candidate: MoveCandidate) -> int:
        """Blocks a request will take wherever it goes; a mean of the queue where its instance did not say."""
        if candidate.waiting and not candidate.blocks and self.waiting:
            return ceil(self.queued_blocks / self.waiting)
        return candidate.blocks

    def without(self, candidate: MoveCandidate) -> "Load":
        """This load once the request has left. Who is next in the queue is not known: a mean stands for
        it."""
        blocks = self.demand(candidate)
        if not candidate.waiting:
            return self._changed(-blocks, 0, self.head_blocks, -1, 0, candidate.execution_priority)
        queued, waiting = max(0, self.queued_blocks - blocks), max(0, self.waiting - 1)
        was_head = blocks == self.head_blocks
        head = (ceil(queued / waiting) if waiting else 0) if was_head else min(self.head_blocks, queued)
        return self._changed(0, -blocks, head, 0, -1, candidate.execution_priority)

    def joined(self, candidate: MoveCandidate, blocks: int) -> "Load":
        """This load once the request, which needs ``blocks``, has come."""
        if not candidate.waiting:
            return self._changed(blocks, 0, self.head_blocks, 1, 0, candidate.execution_priority)
        return self._changed(0, blocks, self.head_blocks or blocks, 0, 1, candidate.execution_priority)

    def _changed(
        self, used: int, queued: int, head_blocks: int, batch: int, waiting: int, priority: int
    ) -> "Load":
        return Load(
            self.capacity_blocks,
            max(0, self.used_blocks + used),
            head_blocks,
            max(0, self.queued_blocks + queued),
            self.placed_blocks,
            max(0, self.batch + batch),
            max(0, self.waiting + waiting),
            self.placed_requests,
            _counted(self.priorities, priority, batch) if batch else self.priorities,
            self.draining,
        )


def free_blocks(view: InstanceView) -> int:
    """The same as ``Load.of(view).free_blocks``, for dispatch, which asks of many views and nothing else."""
    used = view.used_blocks + view.arriving_blocks - view.leaving_blocks
    return view.capacity_blocks - max(0, used) - view.waiting_blocks - view.placed_blocks


def room_blocks(view: InstanceView) -> int:
    """Blocks left for a newcomer right now: as `free_blocks`, but a request that is leaving has its blocks
    until it is gone."""
    used = view.used_blocks + view.arriving_blocks
    return view.capacity_blocks - used - view.waiting_blocks - view.placed_blocks


def headroom(priorities: Priorities, headroom_blocks: int) -> int:
    """Blocks to keep free: a priority's headroom is shared by its requests, so each class counts once."""
    if not priorities or priorities[-1][0] <= 0:
        return 0  # they are in rising order: none is above 0
    return headroom_blocks * classes_above_normal(priorities)


def classes_above_normal(priorities: Priorities) -> int:
    """How many execution priorities above 0 run."""
    return sum(1 for priority, running in priorities if priority > 0 and running > 0)


def _counted(priorities: Priorities, priority: int, change: int) -> Priorities:
    counts = dict(priorities)
    counts[priority] = counts.get(priority, 0) + change
    return tuple((key, count) for key, count in sorted(counts.items()) if count > 0)
