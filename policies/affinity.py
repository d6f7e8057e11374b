"""Where a new request goes when an instance has the KV of its beginning in host memory: the next turn of a
conversation, or a prompt that many share.

Reading KV from the host takes a small part of the time that computing it takes, so such an instance has less
to do before the first token. How much less, and whether others are ahead of it there, is all in one unit, the
blocks to be computed or to become free before: so the prefix is followed as long as that makes the first
token come earlier, and a crowd with one prefix spreads by itself. Called by the global scheduler for every
placement.
"""

from collections.abc import Sequence

from llumnix.core.config import SchedulerConfig
from llumnix.core.views import DispatchDecision, InstanceView, RequestView
from llumnix.policies.dispatch import SCORES_MAX, FreenessDispatch
from llumnix.policies.freeness import headroom, room_blocks


class AffinityDispatch:
    """As `freeness`, but an instance that keeps the beginning of the request is preferred if that makes for
    fewer blocks before its first token. An urgent request goes where it decodes best, whatever is kept."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._freest = FreenessDispatch(config)

    def place(self, request: RequestView, candidates: Sequence[InstanceView]) -> DispatchDecision:
        """See the class. Looks at the candidates that `freeness` does and at those that keep something."""
        freest, first = self._freest.choose(request, candidates)
        if not request.kept or request.execution_priority > 0:
            return freest
        saved = {kept.view.instance_id: kept.blocks for kept in request.kept}
        least = blocks_before(request, first) - saved.get(first.instance_id, 0)
        best, best_blocks = None, least
        for kept in request.kept:
            blocks = blocks_before(request, kept.view) - kept.blocks
            if blocks < best_blocks:
                best, best_blocks = kept, blocks
        if best is None:
            return freest
        chosen = best.view
        scores = ((chosen.instance_id, chosen.queue_freeness), *freest.scores)[:SCORES_MAX]
        reason = f"keeps {best.blocks} blocks of it: {best_blocks} blocks before its first token"
        return DispatchDecision(
            chosen.instance_id, scores, f"{reason}, {least} on {first.instance_id}, the freest"
        )


def blocks_before(request: RequestView, view: InstanceView) -> int:
    """Blocks that are computed there, or have to become free, before the request has its first token, if
    nothing of it is kept there: its own, those of requests ahead of it, and those that it lacks beside the
    headroom of urgent ones."""
    reserve = headroom(view.execution_priorities, view.headroom_blocks)
    missing = request.blocks + reserve - room_blocks(view)
    ahead = request.blocks + view.waiting_blocks + view.placed_blocks
    return ahead + missing if missing > 0 else ahead
