"""How many instances there should be: looked at once a round, acted on by the manager (control/scaler.py)."""

from collections import deque
from math import ceil, exp, sqrt

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceState
from llumnix.core.views import ClusterSnapshot, InstanceView, ScalingDecision
from llumnix.policies.freeness import Load

FILL_MAX = 0.95  # of an instance's blocks: the last few are too scattered over instances to be of use
SAMPLE_S = 1.0
MEMORY_S = 600.0


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


class DemandScaling:
    """As many instances as hold what requests want of memory, and what that may grow by until another one
    could serve.

    Demand is every block in use, queued or on its way, so with migration the cluster counts as one memory.
    How much it changes within ``scale_horizon_s`` is learnt: the root mean square over about MEMORY_S. Kept
    free are ``scale_spare`` times that, the safety stock of inventory theory, so bursts get more room than
    steady arrivals do. It grows in any round by as many as are missing, and shrinks by as many as were too
    many at every moment of the last ``scale_cooldown_s``."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._spare, self._horizon_s = config.scale_spare, config.scale_horizon_s
        self._patience_s = config.scale_cooldown_s
        # (time, demand), one a second, horizon_s of them
        self._past: deque[tuple[float, float]] = deque()
        # (time, instances), falling: the greatest comes first
        self._needs: deque[tuple[float, int]] = deque()
        self._square, self._weight = 0.0, 0.0
        self._began_at: float | None = None

    def scale(self, cluster: ClusterSnapshot) -> ScalingDecision:
        """By several at a time; nothing while nobody serves."""
        serving = [view for view in cluster.instances if view.state is InstanceState.SERVING]
        if not serving:
            return ScalingDecision(0, "")
        now, have = cluster.now, len(serving) + cluster.coming
        capacity = FILL_MAX * sum(view.capacity_blocks for view in serving) / len(serving)
        demand = sum(_wanted_blocks(view) for view in cluster.instances)
        spare = self._spare * self._change(demand, now)
        need = max(1, ceil((demand + spare) / capacity))
        most = self._most(need, now)
        reason = f"{demand:.0f} blocks wanted and {spare:.0f} spare need {need} instances"
        if need > have:
            return ScalingDecision(need - have, reason, at_once=True)
        if most < have and self._began_at is not None and now - self._began_at >= self._patience_s:
            reason += f", {most} at most in {self._patience_s:g} s"
            return ScalingDecision(most - have, reason, at_once=True)
        return ScalingDecision(0, "")

    def _change(self, demand: float, now: float) -> float:
        """How much demand changes within the horizon, in blocks; 0 before it has been watched that long."""
        if self._began_at is None:
            self._began_at = now
        if self._past and now - self._past[-1][0] < SAMPLE_S:
            return self._deviation
        elapsed_s = now - self._past[-1][0] if self._past else 0.0
        self._past.append((now, demand))
        while len(self._past) > 1 and self._past[1][0] <= now - self._horizon_s:
            self._past.popleft()
        if now - self._began_at >= self._horizon_s:
            fresh = 1 - exp(-elapsed_s / MEMORY_S)
            self._square += fresh * ((demand - self._past[0][1]) ** 2 - self._square)
            self._weight += fresh * (1 - self._weight)
        return self._deviation

    @property
    def _deviation(self) -> float:
        return sqrt(self._square / self._weight) if self._weight else 0.0

    def _most(self, need: int, now: float) -> int:
        """The greatest need of the last ``patience_s``."""
        while self._needs and self._needs[-1][1] <= need:
            self._needs.pop()
        self._needs.append((now, need))
        while self._needs[0][0] < now - self._patience_s:
            self._needs.popleft()
        return self._needs[0][1]


def _wanted_blocks(view: InstanceView) -> int:
    if view.state not in (InstanceState.SERVING, InstanceState.DRAINING):
        return 0
    load = Load.of(view)
    return load.capacity_blocks - load.free_blocks
