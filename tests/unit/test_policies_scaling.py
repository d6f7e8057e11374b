"""The number of instances: a band of freeness, cool-down, bounds, one change at a time."""

import pytest
from control_driving import ToyCluster
from policy_views import running, view

from llumnix.control.effects import ScaleTo
from llumnix.core.config import SchedulerConfig
from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import InstanceState
from llumnix.core.views import ClusterSnapshot, InstanceView, ScalingDecision
from llumnix.policies.scaling import FreenessScaling

CONFIG = SchedulerConfig(
    scaling_policy="freeness", pairing_policy="none", scale_cooldown_s=10.0, scale_instances_max=3
)


def change(*views: InstanceView) -> ScalingDecision:
    return FreenessScaling(CONFIG).scale(ClusterSnapshot(0.0, views, frozenset()))


def test_one_more_below_the_band_one_less_above_none_within() -> None:
    assert change(running("a", *[9] * 10), running("b", *[8] * 10)).change == 1
    assert change(running("a", *[9] * 10), view("b")).change == 0
    fewer = change(running("a", 20), view("b"))
    assert fewer.change == -1 and "mean freeness 90.0 of 2 instances is above 60" in fewer.reason
    assert change().change == 0


def test_only_normal_work_on_serving_instances_counts() -> None:
    urgent = running("a", 40, 10, execution_priorities=((1, 2),))
    assert change(urgent).change == 0, "25 steps left, whatever is kept free beside them"
    assert (
        change(urgent, view("b", state=InstanceState.DRAINING), view("c", state=InstanceState.SILENT)).change
        == 0
    )


class Cluster(ToyCluster):
    """Keeps what scaling asked for."""

    def wanted(self, seconds: float) -> list[int]:
        found: list[int] = []
        for _ in range(int(seconds / 0.25)):
            self.report()
            self.now += 0.25
            effects = self.core.tick(self.now)
            found += [effect.instances for effect in effects if isinstance(effect, ScaleTo)]
            self.do([effect for effect in effects if not isinstance(effect, ScaleTo)])
        return found


def test_it_grows_once_a_cool_down_up_to_its_bound_and_says_why() -> None:
    cluster = Cluster(CONFIG, a=100, b=100)
    for name in "ab":
        cluster.instances[name].running = {f"{name}{n}": 9 for n in range(10)}
    assert cluster.wanted(9.5) == [], "a new manager looks on first"
    assert cluster.wanted(1.0) == [3]
    assert "mean freeness 1.0" in cluster.events("scaling")[0].text
    assert cluster.wanted(9.0) == []
    cluster.add("c").running = {f"c{n}": 9 for n in range(10)}
    assert cluster.wanted(30.0) == [], "three is the most"


def test_it_shrinks_but_never_below_one_and_waits_for_a_drain_to_end() -> None:
    cluster = Cluster(CONFIG, a=100, b=100)
    assert cluster.wanted(10.5) == [1]
    cluster.do(cluster.core.set_draining("b", True, cluster.now))  # type: ignore[arg-type]
    assert cluster.wanted(30.0) == []
    cluster.do(cluster.core.instance_ended("b", "a", cluster.now))
    del cluster.instances["b"]
    assert cluster.wanted(30.0) == []


def test_off_unless_asked_for_and_switched_on_at_run_time() -> None:
    cluster = Cluster(SchedulerConfig(), a=100, b=100)
    assert cluster.wanted(60.0) == []
    cluster.do(cluster.core.set_policy("scaling", "freeness", {"scale_cooldown_s": "1"}, cluster.now))  # type: ignore[arg-type]
    assert cluster.wanted(1.0) == [1]


@pytest.mark.parametrize(
    "wrong",
    [{"scale_low_freeness": 70.0}, {"scale_instances_min": 0}, {"scale_instances_min": 9}],
)
def test_a_band_or_bound_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"scale_(high|instances)"):
        SchedulerConfig(**wrong)  # type: ignore[arg-type]
