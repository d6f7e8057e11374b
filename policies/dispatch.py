"""Where a new request goes. Called by the global scheduler for every placement, so a policy looks at a
handful of candidates only: they come in falling order of its ``score`` (``queue_freeness`` for one that has
none), kept up to date as instances change.
"""

from collections.abc import Sequence
from itertools import islice
from zlib import crc32

from llumnix.core.config import SchedulerConfig
from llumnix.core.views import DispatchDecision, InstanceView, RequestView
from llumnix.policies.freeness import free_blocks, room_blocks

SCORES_MAX = 4
CONSIDERED_MAX = 8


class FreenessDispatch:
    """The freest instance by ``queue_freeness``; of the freest few, one that has room for the prompt right
    now: so much that the instance stays above ``low_freeness`` with it, or where none has that, room at all.
    The two differ where a large request is leaving, which makes an instance the freest before anything is
    free there. An urgent request sees freeness without headroom, so it finds the instances kept clear for its
    like the freest until they are as full as others."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Uses ``low_freeness``."""
        self._low = config.low_freeness

    def place(self, request: RequestView, candidates: Sequence[InstanceView]) -> DispatchDecision:
        """See the class. Room is preferred over freeness only among the first CONSIDERED_MAX candidates."""
        return self.choose(request, candidates)[0]

    def choose(
        self, request: RequestView, candidates: Sequence[InstanceView]
    ) -> tuple[DispatchDecision, InstanceView]:
        """The decision, and the instance it names."""
        best = candidates[:SCORES_MAX]
        scores = tuple([(view.instance_id, view.queue_freeness) for view in best])
        first = best[0]
        narrow: InstanceView | None = None
        for view in islice(candidates, CONSIDERED_MAX):
            left, above = room_blocks(view) - request.blocks, view.queue_freeness > self._low
            if above and left >= self._low * (view.running + view.placed_requests + 1):
                wanted = f" with {request.blocks} free blocks and to spare"
                reason = "freest" if view is first else "freest" + wanted
                return DispatchDecision(view.instance_id, scores, reason), view
            if narrow is None and left >= 0:
                narrow = view
            if narrow is not None and not above:
                break  # they come in falling order: none has more to spare
        if narrow is not None:
            reason = f"freest with {request.blocks} free blocks"
            return DispatchDecision(narrow.instance_id, scores, reason), narrow
        return DispatchDecision(first.instance_id, scores, "freest; it will wait for blocks"), first


class RoundRobin:
    """Instances in turn, by id, whatever their load."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._last = ""

    def place(self, request: RequestView, candidates: Sequence[InstanceView]) -> DispatchDecision:
        """The next id after the last one chosen, from the start again behind the greatest."""
        ids = [view.instance_id for view in candidates]
        later = [instance_id for instance_id in ids if instance_id > self._last]
        self._last = min(later or ids)
        scores = tuple((view.instance_id, view.queue_freeness) for view in islice(candidates, SCORES_MAX))
        return DispatchDecision(self._last, scores, "next in turn")


class LeastLoaded:
    """Least loaded by memory, the demand of queued requests counted: the dispatch of the Llumnix paper's
    baseline INFaaS++ (OSDI'24, section 6)."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def score(self, view: InstanceView) -> float:
        """Blocks wanted, as a share of those there are; negative, since higher is better."""
        return (free_blocks(view) - view.capacity_blocks) / max(1, view.capacity_blocks)

    def place(self, request: RequestView, candidates: Sequence[InstanceView]) -> DispatchDecision:
        """The first: candidates come in order of the score."""
        scores = tuple([(view.instance_id, self.score(view)) for view in candidates[:SCORES_MAX]])
        return DispatchDecision(candidates[0].instance_id, scores, f"least loaded: {-scores[0][1]:.0%}")


class LeastRequests:
    """Fewest requests, running, waiting and on their way there, whatever their size."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def score(self, view: InstanceView) -> float:
        """The count; negative, since higher is better."""
        return -float(_requests(view))

    def place(self, request: RequestView, candidates: Sequence[InstanceView]) -> DispatchDecision:
        """The first: candidates come in order of the score."""
        scores = tuple([(view.instance_id, self.score(view)) for view in candidates[:SCORES_MAX]])
        return DispatchDecision(candidates[0].instance_id, scores, f"fewest requests: {-scores[0][1]:.0f}")


class PowerOfTwo:
    """The freer of two instances that a hash of the request's id points at: nearly as even as looking at all
    of them, and dispatchers with an old view do not all run to the same one (Mitzenmacher, 2001)."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def place(self, request: RequestView, candidates: Sequence[InstanceView]) -> DispatchDecision:
        """The two are distinct where there are two; the earlier candidate is the freer one."""
        count, drawn = len(candidates), crc32(request.request_id.encode())
        first = drawn % count
        second = (first + 1 + (drawn // count) % (count - 1)) % count if count > 1 else first
        better, worse = sorted((first, second))
        pair = (candidates[better],) if better == worse else (candidates[better], candidates[worse])
        scores = tuple([(view.instance_id, view.queue_freeness) for view in pair])
        return DispatchDecision(pair[0].instance_id, scores, "freer of two drawn by the request's id")


def _requests(view: InstanceView) -> int:
    present = view.running + view.waiting + view.placed_requests
    return max(0, present + view.migrating_in - view.migrating_out)
