"""When the cluster grows and shrinks by itself.

The policy sees the cluster every round. Its wish is acted on when the last action has shown its effect:
``scale_cooldown_s`` after it, with no instance starting or being emptied; a policy that counts those itself
says ``at_once``. One that is empty and stays is an operator's, and waited for by nobody. Nothing is changed
while an instance is silent: nobody knows then what there is. The number stays within ``scale_instances_min``
and ``scale_instances_max``, so never below one. The driver takes instances back that are being emptied, then
starts others; or it drains those with the fewest requests by migration and stops them. Called by the global
scheduler only.
"""

from dataclasses import replace

from llumnix.control.cluster_view import ClusterView
from llumnix.control.effects import Logged, ScaleTo
from llumnix.control.instance_record import InstanceRecord
from llumnix.control.policy_guard import GuardedScaling
from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceState
from llumnix.policies.registry import NO_SCALING

ORDER_MEMORY_S = 300.0  # then what was asked for and has not come is asked for again


class Scaler:
    """See the module. A new one waits for a cool-down first."""

    def __init__(
        self, config: SchedulerConfig, policy: GuardedScaling, cluster: ClusterView, now: float
    ) -> None:
        self._cluster = cluster
        self._acted_at = now
        self._ordered = 0
        self.use(config, policy)

    def use(self, config: SchedulerConfig, policy: GuardedScaling) -> None:
        """Go by these settings from now on."""
        self._config = config
        self._policy = policy

    def round(self, now: float) -> list[ScaleTo | Logged]:
        """Act on the policy's wish, if it may be."""
        config = self._config
        if config.scaling_policy == NO_SCALING:
            return []
        states = [record.state for record in self._cluster.live() if not _put_aside(record)]
        if not states or InstanceState.SILENT in states:
            return []
        serving, coming = self._count(states, now)
        have = serving + coming
        snapshot = self._cluster.snapshot(now, frozenset(), frozenset())
        decision = self._policy.scale(replace(snapshot, coming=coming))
        settled = have == len(states) and not coming and now - self._acted_at >= config.scale_cooldown_s
        if decision.change == 0 or not (decision.at_once or settled):
            return []
        target = max(config.scale_instances_min, min(config.scale_instances_max, have + decision.change))
        if target == have or (target > have) != (decision.change > 0):
            return []
        self._acted_at = now
        self._ordered = target if target > have else 0
        text = f"{have} to {target} instances: {decision.reason}"
        return [ScaleTo(target, decision.reason), Logged("scaling", text, {"instances": target})]

    def _count(self, states: list[InstanceState], now: float) -> tuple[int, int]:
        """Instances that serve, and those on their way: seen to start, or asked for and not seen yet."""
        serving = states.count(InstanceState.SERVING)
        if serving >= self._ordered or now - self._acted_at > ORDER_MEMORY_S:
            self._ordered = 0
        return serving, max(self._ordered - serving, states.count(InstanceState.STARTING))


def _put_aside(record: InstanceRecord) -> bool:
    """Whether it is drained and empty: one that was to be stopped would be gone."""
    return record.state is InstanceState.DRAINING and record.drained
