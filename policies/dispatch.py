"""Where a new request goes. Called by the global scheduler for every placement, so the default looks at a
handful of candidates only: they come freest first."""

from itertools import islice

from llumnix.core.config import SchedulerConfig
from llumnix.core.views import DispatchDecision, InstanceView, RequestView
from llumnix.policies.freeness import Load

SCORES_MAX = 8


class FreenessDispatch:
    """The freest instance by ``queue_freeness``; of the freest few, one that has room for the prompt right
    now."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def place(self, request: RequestView, candidates: tuple[InstanceView, ...]) -> DispatchDecision:
        """See the class. Room is preferred over freeness only among the first SCORES_MAX candidates."""
        best = candidates[:SCORES_MAX]
        scores = tuple([(view.instance_id, view.queue_freeness) for view in best])
        for view in best:
            if Load.of(view).free_blocks >= request.blocks:
                reason = "freest" if view is best[0] else f"freest with {request.blocks} free blocks"
                return DispatchDecision(view.instance_id, scores, reason)
        return DispatchDecision(best[0].instance_id, scores, "freest; it will wait for blocks")


class RoundRobin:
    """Instances in turn, by id, whatever their load."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._last = ""

    def place(self, request: RequestView, candidates: tuple[InstanceView, ...]) -> DispatchDecision:
        """The next id after the last one chosen, from the start again behind the greatest."""
        ids = [view.instance_id for view in candidates]
        later = [instance_id for instance_id in ids if instance_id > self._last]
        self._last = min(later or ids)
        scores = tuple((view.instance_id, view.queue_freeness) for view in islice(candidates, SCORES_MAX))
        return DispatchDecision(self._last, scores, "next in turn")
