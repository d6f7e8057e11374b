"""Room kept beside requests of high execution priority: as much as the cluster can spare; and where such
requests go."""

from dataclasses import replace

from control_driving import ToyCluster, place
from policy_views import request, running

from llumnix.core.config import SchedulerConfig
from llumnix.core.effects import Send
from llumnix.core.messages.control import Placed
from llumnix.policies.dispatch import FreenessDispatch


def urgent(
    cluster: ToyCluster, request_id: str, prompt_tokens: int = 31, *, scheduling: int = 1, execution: int = 1
) -> str:
    """Where a request of these priorities is placed."""
    asked = replace(
        place(request_id, prompt_tokens), scheduling_priority=scheduling, execution_priority=execution
    )
    answers = [one.message for one in cluster.core.handle(asked, cluster.now) if isinstance(one, Send)]
    return next(answer.instance_id for answer in answers if isinstance(answer, Placed))


def kept(cluster: ToyCluster) -> int:
    """Blocks of headroom on instance a, seen from its freeness with and without a high request's."""
    row = next(row for row in cluster.core.instance_rows(cluster.now) if row.instance_id == "a")
    toy = cluster.instances["a"]
    free = toy.capacity - sum(toy.running.values())
    return round(free - row.freeness * max(1, len(toy.running)))


def with_high(config: SchedulerConfig, others: int) -> ToyCluster:
    """Two instances; a runs a high request of 10 blocks, b normal ones of so many."""
    cluster = ToyCluster(config, a=1000, b=1000)
    cluster.instances["a"].running = {"high": 10}
    cluster.instances["a"].priorities = {"high": 1}
    cluster.instances["b"].running = {"normal": others} if others else {}
    cluster.report()
    cluster.step()
    return cluster


def test_headroom_is_full_while_the_cluster_has_memory_to_spare_and_shrinks_as_it_fills() -> None:
    config = SchedulerConfig(headroom_share=0.8, headroom_spare_share=0.5, pairing_policy="none")
    assert kept(with_high(config, 0)) == 800
    assert kept(with_high(config, 890)) == 550  # half of the 1,100 blocks that are free
    assert kept(with_high(config, 1000)) == 495
    assert kept(with_high(replace(config, headroom_spare_share=0.0), 0)) == 0


def test_urgent_requests_gather_where_their_like_run_until_it_is_as_full_as_others() -> None:
    config = SchedulerConfig(headroom_share=0.8, headroom_spare_share=1.0, pairing_policy="none")
    cluster = with_high(config, 700)
    normal = cluster.place("n", 31)
    assert isinstance(normal, Placed) and normal.instance_id == "b", "headroom keeps it off a"
    assert urgent(cluster, "u1") == "a"
    assert urgent(cluster, "u2", prompt_tokens=16 * 220) == "a"
    roomy = with_high(config, 100)
    assert urgent(roomy, "u1") == "a"
    assert urgent(roomy, "u2") == "b", "a is the more crowded one by now"


def with_spread(config: SchedulerConfig) -> ToyCluster:
    """Four instances of 1,000 blocks; a and b run urgent requests, b most of them, c and d normal ones."""
    cluster = ToyCluster(config, a=1000, b=1000, c=1000, d=1000)
    cluster.instances["a"].running = {"u0": 20, "n0": 100}
    cluster.instances["b"].running = {"u1": 20, "u2": 20}
    cluster.instances["c"].running = {"n1": 400}
    cluster.instances["d"].running = {"n2": 440}
    for name in "ab":
        urgent_ones = [one for one in cluster.instances[name].running if one.startswith("u")]
        cluster.instances[name].priorities = dict.fromkeys(urgent_ones, 1)
    return cluster


def test_few_instances_get_headroom_in_full_and_keep_it() -> None:
    config = SchedulerConfig(headroom_share=0.8, headroom_spare_share=0.3, pairing_policy="none")
    cluster = with_spread(config)
    cluster.report()
    cluster.step()
    records = {record.instance_id: record.headroom_blocks for record in cluster.core._cluster.records()}
    assert records == {"a": 100, "b": 800, "c": 0, "d": 0}, "0.3 of the 3,000 blocks that are free"
    cluster.instances["a"].running |= {"u3": 20, "u4": 20}
    cluster.instances["a"].priorities |= {"u3": 1, "u4": 1}
    cluster.report()
    cluster.step()
    kept_now = {record.instance_id: record.headroom_blocks for record in cluster.core._cluster.records()}
    assert kept_now == {"a": 88, "b": 800, "c": 0, "d": 0}, "though a runs more of them by now"


def test_an_urgent_request_does_not_mind_a_queue_that_it_overtakes() -> None:
    cluster = ToyCluster(SchedulerConfig(pairing_policy="none"), a=100, b=100)
    cluster.instances["a"].running = {"old": 40}
    cluster.instances["a"].waiting = {f"w{number}": 30 for number in range(9)}
    cluster.instances["b"].running = {"old-b": 90}
    cluster.report()
    normal = cluster.place("n")
    assert isinstance(normal, Placed) and normal.instance_id == "b"
    assert urgent(cluster, "s", execution=0) == "b", "it overtakes, but headroom is not for it"
    assert urgent(cluster, "e", scheduling=0) == "b", "it waits its turn"
    assert urgent(cluster, "u") == "a"


def test_a_normal_request_is_not_kept_from_room_that_is_there() -> None:
    views = (running("a", 90, execution_priorities=((1, 1),)), running("b", 97))
    policy = FreenessDispatch(SchedulerConfig())
    assert policy.place(request(8), views).instance_id == "a"
    high = request(8)._replace(scheduling_priority=1, execution_priority=1)
    assert policy.place(high, views).instance_id == "a", "headroom is for its like"


def test_headroom_is_shared_anew_once_an_urgent_request_runs_and_after_the_last_has_gone() -> None:
    config = SchedulerConfig(headroom_share=0.8, headroom_spare_share=0.5, pairing_policy="none")
    cluster = ToyCluster(config, a=1000, b=1000)
    cluster.instances["b"].running = {"normal": 890}
    cluster.report()
    cluster.step()
    assert kept(cluster) == 0, "nobody runs for whom it is kept"
    cluster.instances["a"].running, cluster.instances["a"].priorities = {"high": 10}, {"high": 1}
    cluster.report()
    cluster.step()
    assert kept(cluster) == 550
    cluster.instances["a"].running, cluster.instances["a"].priorities = {}, {}
    cluster.instances["b"].running = {}
    cluster.report()
    cluster.step()
    assert kept(cluster) == 0
    cluster.instances["a"].running, cluster.instances["a"].priorities = {"later": 10}, {"later": 1}
    cluster.report()
    assert kept(cluster) == 800, "as shared when the last had gone; the next round looks again"


def test_an_instance_that_drains_needs_no_headroom() -> None:
    config = SchedulerConfig(headroom_share=0.8, headroom_spare_share=0.5, pairing_policy="none")
    cluster = ToyCluster(config, a=1000, b=1000)
    for name in "ab":
        cluster.instances[name].running = {f"{name}{number}": 10 for number in range(5)}
        cluster.instances[name].priorities = {f"{name}{number}": 1 for number in range(5)}
    cluster.report()
    cluster.step()
    assert kept(cluster) == 800, "a comes first by its id"
    cluster.do(cluster.core.set_draining("a", True, cluster.now))  # type: ignore[arg-type]
    cluster.step()
    blocks = {record.instance_id: record.headroom_blocks for record in cluster.core._cluster.records()}
    assert blocks == {"b": 475, "a": 0}, "half of the 950 blocks that are free on b"


def test_headroom_is_not_kept_with_the_dead_nor_taken_from_those_who_live() -> None:
    config = SchedulerConfig(headroom_share=0.8, headroom_spare_share=0.5, pairing_policy="none")
    cluster = ToyCluster(config, a=1000, b=1000, c=1000)
    for name in "ac":
        cluster.instances[name].running = {f"{name}{number}": 10 for number in range(5)}
        cluster.instances[name].priorities = {f"{name}{number}": 1 for number in range(5)}
    cluster.report()
    cluster.step()
    cluster.do(cluster.core.instance_ended("a", "a", cluster.now))
    del cluster.instances["a"]
    cluster.step()
    blocks = {record.instance_id: record.headroom_blocks for record in cluster.core._cluster.live()}
    assert blocks == {"c": 800, "b": 175}, "half of the 1,950 blocks that are free, first where it is of use"
