"""When the cluster grows and shrinks by itself.

The policy sees the cluster once a round; its wish is acted on only when the last action has shown its effect:
``scale_cooldown_s`` after it, with no instance starting, draining or silent. The number stays within
``scale_instances_min`` and ``scale_instances_max``, so never below one. The driver starts instances, or
drains those with the fewest requests by migration and stops them. Called by the global scheduler only.
"""

from llumnix.control.cluster_view import ClusterView
from llumnix.control.effects import Logged, ScaleTo
from llumnix.control.policy_guard import GuardedScaling
from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceState


class Scaler:
    """See the module. A new one waits for a cool-down first."""

    def __init__(
        self, config: SchedulerConfig, policy: GuardedScaling, cluster: ClusterView, now: float
    ) -> None:
        self._cluster = cluster
        self._acted_at = now
        self.use(config, policy)

    def use(self, config: SchedulerConfig, policy: GuardedScaling) -> None:
        """Go by these settings from now on."""
        self._config = config
        self._policy = policy

    def round(self, now: float) -> list[ScaleTo | Logged]:
        """Act on the policy's wish, if it may be."""
        config = self._config
        if now - self._acted_at < config.scale_cooldown_s:
            return []
        live = self._cluster.live()
        if not live or any(record.state is not InstanceState.SERVING for record in live):
            return []
        decision = self._policy.scale(self._cluster.snapshot(now, frozenset(), frozenset()))
        wanted = len(live) + decision.change
        target = max(config.scale_instances_min, min(config.scale_instances_max, wanted))
        if decision.change == 0 or target == len(live) or (target > len(live)) != (decision.change > 0):
            return []
        self._acted_at = now
        text = f"{len(live)} to {target} instances: {decision.reason}"
        return [ScaleTo(target, decision.reason), Logged("scaling", text, {"instances": target})]
