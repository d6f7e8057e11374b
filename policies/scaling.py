"""How many instances there should be: looked at once a round, acted on by the manager (control/scaler.py)."""

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceState
from llumnix.core.views import ClusterSnapshot, ScalingDecision
from llumnix.policies.freeness import Load


class NoScaling:
    """As many as the administrator asked for."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def scale(self, cluster: ClusterSnapshot) -> ScalingDecision:
        """Never a change."""
        return ScalingDecision(0, "")


class FreenessScaling:
    """The mean freeness of the serving instances stays within a band (Llumnix, OSDI'24, section 4.4.3): one
    more below it, one less above. Normal work alone counts: headroom kept for priorities is no load."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._low, self._high = config.scale_low_freeness, config.scale_high_freeness

    def scale(self, cluster: ClusterSnapshot) -> ScalingDecision:
        """One step at most; nothing while nobody serves."""
        serving = (view for view in cluster.instances if view.state is InstanceState.SERVING)
        scores = [Load.of(view).freeness(0) for view in serving]
        if not scores:
            return ScalingDecision(0, "")
        mean = sum(scores) / len(scores)
        reason = f"mean freeness {mean:.1f} of {len(scores)} instances"
        if mean < self._low:
            return ScalingDecision(1, f"{reason} is below {self._low:g}")
        if mean > self._high:
            return ScalingDecision(-1, f"{reason} is above {self._high:g}")
        return ScalingDecision(0, "")
