"""The number of instances: a band of freeness, cool-down, bounds, one change at a time."""

import pytest
from control_driving import ToyCluster
from policy_views import running, view

from llumnix.control.effects import ScaleTo
from llumnix.control.scaler import ORDER_MEMORY_S
from llumnix.core.config import SchedulerConfig
from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import InstanceState
from llumnix.core.views import ClusterSnapshot, InstanceView, ScalingDecision
from llumnix.policies.scaling import MEMORY_S, DemandScaling, FreenessScaling

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


def test_an_instance_that_an_operator_keeps_empty_holds_up_no_scaling() -> None:
    cluster = Cluster(CONFIG, a=100, b=100, c=100)
    for name in "abc":
        cluster.instances[name].running = {f"{name}{n}": 9 for n in range(10)}
    cluster.do(cluster.core.set_draining("c", True, cluster.now))  # type: ignore[arg-type]
    assert cluster.wanted(30.0) == [], "it is being emptied"
    cluster.instances["c"].running = {}
    assert cluster.wanted(1.0) == [3], "two serve, and one more"


def test_off_unless_asked_for_and_switched_on_at_run_time() -> None:
    cluster = Cluster(SchedulerConfig(), a=100, b=100)
    assert cluster.wanted(60.0) == []
    cluster.do(cluster.core.set_policy("scaling", "freeness", {"scale_cooldown_s": "1"}, cluster.now))  # type: ignore[arg-type]
    assert cluster.wanted(1.0) == [1]


DEMAND = SchedulerConfig(
    scaling_policy="demand",
    pairing_policy="none",
    scale_spare=1.0,
    scale_horizon_s=10.0,
    scale_cooldown_s=20.0,
)


def watched(policy: DemandScaling, seconds: range, *views: InstanceView, coming: int = 0) -> ScalingDecision:
    """The last decision of those made once a second."""
    decision = ScalingDecision(0, "")
    for second in seconds:
        decision = policy.scale(ClusterSnapshot(float(second), views, frozenset(), coming=coming))
    return decision


def test_demand_grows_by_as_many_as_are_missing_and_counts_those_coming() -> None:
    policy = DemandScaling(DEMAND)
    queued = view("a", used_blocks=90, running=9, waiting=9, waiting_blocks=180)
    wanted = watched(policy, range(1), queued)
    assert (wanted.change, wanted.at_once) == (2, True), "270 blocks on instances of 95 usable ones"
    assert "270 blocks wanted" in wanted.reason
    assert watched(policy, range(1, 2), queued, coming=2).change == 0
    assert watched(policy, range(2, 3)).change == 0, "nobody serves"


def test_demand_shrinks_by_as_many_as_were_too_many_all_the_time() -> None:
    policy = DemandScaling(DEMAND)
    views = [running(name, 9) for name in "abcd"]
    assert watched(policy, range(0, 5), *views).change == 0, "it has not looked long enough"
    watched(policy, range(5, 6), *views[:3], running("d", 99, 99))
    assert watched(policy, range(6, 20), *views).change == 0, "it has not looked long enough"
    assert watched(policy, range(20, 24), *views).change == -1, "three were needed less than 20 s ago"
    assert watched(policy, range(24, 60), *views).change == -3


def test_demand_keeps_more_room_where_demand_has_changed_more() -> None:
    steady, bursty = DemandScaling(DEMAND), DemandScaling(DEMAND)
    calm, full = (running("a", 40), running("b", 45)), (running("a", 60), running("b", 125))
    watched(steady, range(0, 200), *calm)
    for second in range(0, 200):
        watched(bursty, range(second, second + 1), *(full if second // 25 % 2 else calm))
    assert watched(steady, range(200, 240), *calm).change == -1, "85 blocks fit one instance"
    assert watched(bursty, range(200, 240), *calm).change == 0, "but may be 185 soon"


def test_what_demand_did_long_ago_is_forgotten() -> None:
    policy = DemandScaling(DEMAND)
    calm, full = (running("a", 40), running("b", 45)), (running("a", 60), running("b", 125))
    for second in range(0, 200):
        watched(policy, range(second, second + 1), *(full if second // 25 % 2 else calm))
    assert watched(policy, range(200, 300), *calm).change == 0
    assert watched(policy, range(300, 300 + 4 * int(MEMORY_S)), *calm).change == -1


def test_requests_of_an_instance_being_emptied_are_still_wanted() -> None:
    leaving = view("b", state=InstanceState.DRAINING, used_blocks=90, running=3)
    assert watched(DemandScaling(DEMAND), range(1), running("a", 60), leaving).change == 1


def test_a_wish_at_once_waits_for_no_cool_down_nor_for_a_drain_and_is_ordered_once() -> None:
    cluster = Cluster(DEMAND, a=100, b=100)
    cluster.report()
    cluster.do(cluster.core.set_draining("b", True, cluster.now))  # type: ignore[arg-type]
    cluster.instances["a"].running = {f"a{n}": 9 for n in range(11)}
    cluster.instances["b"].running = {f"b{n}": 9 for n in range(11)}
    assert cluster.wanted(5.0) == [3], "198 blocks; two more are on their way from then on"


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale_low_freeness": 70.0},
        {"scale_instances_min": 0},
        {"scale_instances_min": 9},
        {"scale_horizon_s": 0.5},
        {"scale_spare": -1.0},
    ],
)
def test_a_band_or_bound_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"scale_(high|instances|horizon|spare)"):
        SchedulerConfig(**wrong)  # type: ignore[arg-type]


class OneMore:
    """Always wants one more, and at once."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def scale(self, cluster: ClusterSnapshot) -> ScalingDecision:
        return ScalingDecision(1, "more", at_once=True)


def test_nothing_changes_while_an_instance_is_silent() -> None:
    config = SchedulerConfig(
        scaling_policy=f"{__name__}:OneMore", pairing_policy="none", scale_instances_max=1000
    )
    cluster = Cluster(config, a=100, b=100)
    assert cluster.wanted(1.0)
    silent = cluster.instances.pop("b")
    cluster.wanted(5.0)
    assert cluster.events("instance_silent")
    assert cluster.wanted(2.0) == [], "nobody knows what there is"
    cluster.instances["b"] = silent
    assert cluster.wanted(1.0)


class NoChange(OneMore):
    """Is content with what there is."""

    def scale(self, cluster: ClusterSnapshot) -> ScalingDecision:
        return ScalingDecision(0, "")


class Breaks(OneMore):
    """Answers once with what is no decision, then breaks."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._asked = 0

    def scale(self, cluster: ClusterSnapshot) -> ScalingDecision:
        self._asked += 1
        if self._asked == 1:
            return ScalingDecision(1.5, "half more", at_once=True)  # type: ignore[arg-type]
        raise KeyError("lost")


def plugged(policy: str, **settings: int) -> Cluster:
    config = SchedulerConfig(scaling_policy=f"{__name__}:{policy}", pairing_policy="none", **settings)  # type: ignore[arg-type]
    return Cluster(config, a=100, b=100, c=100)


def test_more_instances_than_the_bound_stay_if_the_policy_is_content() -> None:
    assert plugged("NoChange", scale_instances_max=2).wanted(200.0) == []


def test_what_was_asked_for_and_never_came_is_asked_for_again() -> None:
    cluster = plugged("OneMore", scale_instances_max=4)
    assert cluster.wanted(ORDER_MEMORY_S) == [4]
    assert cluster.wanted(2.0) == [4]


def test_a_faulty_scaling_policy_changes_nothing_and_is_told() -> None:
    cluster = plugged("Breaks")
    assert cluster.wanted(1.0) == []
    (told,) = cluster.events("policy_error")
    assert "returned ScalingDecision(change=1.5" in told.text and told.fields["kind"] == "scaling"
    assert cluster.wanted(61.0) == []
    assert "raised KeyError" in cluster.events("policy_error")[1].text
