"""Placements: spread between reports, refused with reasons, and forgotten in time."""

from collections import Counter

from control_driving import FRONTEND, ToyCluster, hello, place
from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import FrontendHello, HelloWanted, NotPlaced, Placed
from llumnix.core.views import DispatchDecision, InstanceView, RequestView


def spread(cluster: ToyCluster, count: int, prompt_tokens: int = 31) -> Counter[str]:
    placed: Counter[str] = Counter()
    for number in range(count):
        answer = cluster.place(f"r{number}", prompt_tokens)
        assert isinstance(answer, Placed)
        placed[answer.instance_id] += 1
    return placed


def test_fifty_placements_between_two_reports_spread_evenly() -> None:
    placed = spread(ToyCluster(a=1000, b=1000, c=1000, d=1000, e=1000), 50)
    assert set(placed.values()) == {10}


def test_placements_follow_capacity() -> None:
    placed = spread(ToyCluster(small=200, large=800), 50)
    assert 35 <= placed["large"] <= 45


def test_a_busy_instance_gets_less_until_the_others_are_as_busy() -> None:
    cluster = ToyCluster(a=1000, b=1000)
    cluster.instances["a"].running = {f"old{number}": 20 for number in range(10)}
    cluster.report()
    placed = spread(cluster, 20)
    assert placed["b"] > placed["a"]


def test_accepted_requests_are_not_counted_twice() -> None:
    cluster = ToyCluster(a=1000, b=1000)
    spread(cluster, 10)
    for instance_id in ("a", "b"):
        cluster.instances[instance_id].waiting = {f"{instance_id}{number}": 2 for number in range(5)}
    cluster.instances["a"].accepted = cluster.instances["b"].accepted = [f"r{number}" for number in range(10)]
    cluster.report()
    rows = cluster.core.instance_rows(cluster.now)
    assert [row.freeness for row in rows] == [998.0, 998.0]


def test_a_placement_no_report_confirms_is_forgotten_after_a_while() -> None:
    cluster = ToyCluster(a=1000)
    before = cluster.core.instance_rows(cluster.now)[0].freeness
    cluster.place("r")
    assert cluster.core.instance_rows(cluster.now)[0].freeness < before
    for _ in range(14):
        cluster.report()
        cluster.tick()
    assert cluster.core.instance_rows(cluster.now)[0].freeness == before


def test_a_request_placed_again_counts_once() -> None:
    cluster = ToyCluster(a=1000)
    cluster.place("r")
    once = cluster.core.instance_rows(cluster.now)[0].freeness
    cluster.place("r")
    assert cluster.core.instance_rows(cluster.now)[0].freeness == once


def test_excluded_draining_silent_starting_and_down_instances_get_nothing() -> None:
    cluster = ToyCluster(good=50, drained=1000, silent=1000, dead=1000)
    cluster.do(cluster.core.handle(hello("starting"), cluster.now))
    cluster.do(cluster.core.set_draining("drained", True, cluster.now))  # type: ignore[arg-type]
    cluster.do(cluster.core.instance_ended("dead", "a", cluster.now))
    for _ in range(14):
        cluster.report("good", "drained")
        cluster.tick()
    assert set(spread(cluster, 20)) == {"good"}
    refused = cluster.place("x", exclude=("good",))
    assert isinstance(refused, NotPlaced)
    assert "refused this request or lost it" in refused.reason
    assert refused.retry_after_s > 0


def test_a_silent_instance_that_reports_again_is_used_again() -> None:
    cluster = ToyCluster(a=100)
    cluster.do(cluster.core.handle(FrontendHello("f", FRONTEND), cluster.now))
    for _ in range(14):
        cluster.tick()
    assert isinstance(cluster.place("r"), NotPlaced)
    cluster.report()
    assert isinstance(cluster.place("r"), Placed)
    assert [logged.kind for logged in cluster.logged][-2:] == ["instance_silent", "instance_back"]


def test_a_manager_that_stood_still_does_not_think_everyone_silent() -> None:
    cluster = ToyCluster(a=100)
    cluster.tick(60.0)
    assert isinstance(cluster.place("r"), Placed)


def test_a_prompt_too_long_for_anybody_is_refused_for_good() -> None:
    cluster = ToyCluster(a=100, b=200)
    answer = cluster.place("r", prompt_tokens=200 * 16)
    assert isinstance(answer, NotPlaced)
    assert answer.retry_after_s == 0.0
    assert "3200" in answer.reason
    assert cluster.place("r", prompt_tokens=200 * 16 - 1) == Placed("r", "b", "tcp://b:a")


def test_full_queues_refuse_and_name_a_time() -> None:
    cluster = ToyCluster(a=10, b=10)
    answers = [cluster.place(f"r{number}", prompt_tokens=79) for number in range(40)]
    refused = [answer for answer in answers if isinstance(answer, NotPlaced)]
    factor = cluster.config.queue_blocks_factor
    assert len(answers) - len(refused) == 2 * (int(factor * 10 / 5) + 1)
    assert "queue is full" in refused[0].reason
    assert refused[0].retry_after_s > 0


def test_without_instances_the_answer_depends_on_whether_one_is_starting() -> None:
    cluster = ToyCluster()
    cluster.now += 60
    late = cluster.place("r")
    cluster.do(cluster.core.handle(hello("a"), cluster.now))
    early = cluster.place("r")
    assert isinstance(early, NotPlaced) and isinstance(late, NotPlaced)
    assert early.retry_after_s < late.retry_after_s


def test_an_unknown_frontend_is_asked_for_its_hello_but_not_each_time() -> None:
    cluster = ToyCluster(a=100)
    spread(cluster, 5)
    assert len(cluster.messages(HelloWanted)) == 1
    cluster.do(cluster.core.handle(FrontendHello("f", FRONTEND), cluster.now))
    cluster.now += 5
    cluster.place("r")
    assert len(cluster.messages(HelloWanted)) == 1


def test_equal_instances_are_told_apart_by_id() -> None:
    assert spread(ToyCluster(b=100, a=100), 1) == {"a": 1}


class Stubborn:
    """A policy that always names the same instance."""

    def __init__(self, config: SchedulerConfig) -> None:
        pass

    def place(self, request: RequestView, candidates: tuple[InstanceView, ...]) -> DispatchDecision:
        return DispatchDecision("gone", (), "because")


def test_a_policy_that_names_no_candidate_is_overruled_and_reported() -> None:
    config = SchedulerConfig(dispatch_policy=f"{__name__}:Stubborn")
    cluster = ToyCluster(config, a=100)
    assert cluster.place("r") == Placed("r", "a", "tcp://a:a")
    assert cluster.events("policy_error")


def test_the_default_that_overrules_looks_for_room_too() -> None:
    cluster = ToyCluster(SchedulerConfig(dispatch_policy=f"{__name__}:Stubborn"), a=100, b=200)
    cluster.instances["a"].running = {"old": 70}
    cluster.instances["b"].running = {f"old{number}": 8 for number in range(20)}
    cluster.report()
    assert cluster.place("large", 16 * 35 - 1) == Placed("large", "b", "tcp://b:a"), "a has 30 blocks left"
    assert cluster.place("small") == Placed("small", "a", "tcp://a:a"), "the freest"


@given(st.lists(st.tuples(st.sampled_from("prae"), st.integers(0, 30), st.sampled_from("xyz")), max_size=60))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_the_ledger_ends_empty(history: list[tuple[str, int, str]]) -> None:
    """Place, report (accepting some), age, end and restart: afterwards every view equals its report again."""
    cluster = ToyCluster(x=100, y=100, z=100)
    for action, number, instance_id in history:
        instance = cluster.instances[instance_id]
        if action == "p":
            cluster.place(f"r{number}")
        elif action == "r":
            instance.accepted = [f"r{number}", f"r{number + 1}"]
            cluster.report(instance_id)
        elif action == "a":
            cluster.tick(number / 10)
        else:
            cluster.do(cluster.core.instance_ended(instance_id, instance.incarnation, cluster.now))
            cluster.add(instance_id, 100, incarnation=instance.incarnation + "n")
    for _ in range(20):
        cluster.report()
        cluster.tick()
    assert [row.freeness for row in cluster.core.instance_rows(cluster.now)] == [100.0] * 3


def test_reports_out_of_order_or_repeated_change_nothing() -> None:
    cluster = ToyCluster(a=100)
    instance = cluster.instances["a"]
    old = instance.report()
    instance.running = {"r": 60}
    cluster.report()
    for late in (old, instance.report()._replace(sequence=old.sequence + 1)):
        cluster.do(cluster.core.handle(late, cluster.now))
        assert cluster.core.instance_rows(cluster.now)[0].used_blocks == 60


def test_the_same_history_gives_the_same_decisions() -> None:
    def run() -> list[object]:
        cluster = ToyCluster(a=300, b=200, c=100)
        answers: list[object] = [cluster.place(f"r{number}", 16 * (number % 9) + 1) for number in range(100)]
        return [*answers, *(place(str(order)) for order in cluster.orders)]

    assert run() == run()


def test_candidates_come_in_the_order_of_a_policy_that_scores() -> None:
    """By memory the small instance is fuller; by freeness its short batch would win."""
    config = SchedulerConfig(dispatch_policy="load", pairing_policy="none")
    cluster = ToyCluster(config, a=1000, b=1000)
    cluster.instances["a"].running = {"large": 600}
    cluster.instances["b"].running = {f"small{number}": 5 for number in range(100)}
    cluster.report()
    freest = ToyCluster(SchedulerConfig(pairing_policy="none"), a=1000, b=1000)
    freest.instances = cluster.instances
    freest.report()
    by_load, by_freeness = cluster.place("r"), freest.place("r")
    assert isinstance(by_load, Placed) and isinstance(by_freeness, Placed)
    assert (by_load.instance_id, by_freeness.instance_id) == ("b", "a")
    placed = spread(cluster, 100)
    assert placed["b"] > placed["a"] > 20, "what was placed counts at once"
