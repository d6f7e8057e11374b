"""How a running request that has to give way does so: by copying its KV to host memory, or by giving it up
and computing it again. Run by engines, for one request at a time.
"""

from llumnix.core.config import SchedulerConfig
from llumnix.core.views import PreemptionAction, PreemptionDecision, VictimView


class CheapestPreemption:
    """Whatever takes least time: the copies out and in, or computing all tokens again."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def decide(self, victim: VictimView) -> PreemptionDecision:
        """Swap while nobody knows yet what computing costs."""
        swap_s = victim.swap_out_s + victim.swap_in_s
        scores = (("swap_s", swap_s), ("recompute_s", victim.recompute_s))
        if victim.recompute_s and swap_s > victim.recompute_s:
            return PreemptionDecision(PreemptionAction.RECOMPUTE, scores, "computing again takes less time")
        return PreemptionDecision(PreemptionAction.SWAP, scores, "copying takes less time")


class AlwaysSwap:
    """Copy, whatever it costs."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def decide(self, victim: VictimView) -> PreemptionDecision:
        return PreemptionDecision(PreemptionAction.SWAP, (), "always")


class AlwaysRecompute:
    """Give the KV up, whatever it costs."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def decide(self, victim: VictimView) -> PreemptionDecision:
        return PreemptionDecision(PreemptionAction.RECOMPUTE, (), "always")
