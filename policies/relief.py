"""Whether a request leaves an instance whose blocks are about to run out, before it has to give way there.

When they run out, a running request is swapped or computed again (policies/preemption.py). Moving it costs no
more than a pause of about a step, if there is room elsewhere and time to copy its KV. Called by the control
plane for the request that would give way first, whenever its instance reports that few steps are left.
"""

from collections.abc import Sequence

from llumnix.core.config import SchedulerConfig
from llumnix.core.roles import suits
from llumnix.core.views import InstanceView, ReliefDecision, ReliefView
from llumnix.policies.freeness import Load


class CheapestRelief:
    """Move, if that costs the request less than giving way, ends in time and leaves the target above the low
    mark."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config

    def relieve(
        self, victim: ReliefView, source: InstanceView, targets: Sequence[InstanceView]
    ) -> ReliefDecision:
        """The first target that will do."""
        low = self._config.low_freeness
        scores = (("migrate_s", victim.pause_s), ("give_way_s", victim.loss_s))
        costs = (
            f"moving pauses it {victim.pause_s * 1e3:.0f} ms, giving way costs {victim.loss_s * 1e3:.0f} ms"
        )
        if victim.loss_s and victim.loss_s <= victim.pause_s:
            return ReliefDecision(None, scores, costs)
        if victim.copy_s > victim.left_s:
            late = f"its KV takes {victim.copy_s:.2f} s to copy and blocks last {victim.left_s:.2f} s"
            return ReliefDecision(None, scores, late)
        for target in targets:
            if not suits(target.role, victim.candidate.waiting):
                continue
            after = Load.of(target).joined(victim.candidate, victim.candidate.blocks)
            if after.queue_freeness(target.headroom_blocks) > low:
                reason = f"blocks of {source.instance_id} last {victim.left_s:.2f} s: {costs}"
                return ReliefDecision(target.instance_id, scores, reason)
        return ReliefDecision(None, scores, f"no instance would stay above {low:g} with it")


class NoRelief:
    """Nothing moves because blocks run out; rounds and preemption do what they do."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def relieve(
        self, victim: ReliefView, source: InstanceView, targets: Sequence[InstanceView]
    ) -> ReliefDecision:
        """Never."""
        return ReliefDecision(None, (), "")
