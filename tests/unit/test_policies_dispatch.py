"""Where new requests go, and which requests an instance offers."""

from collections import Counter

import pytest
from policy_views import request, running, view

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.load import MoveCandidate
from llumnix.policies.dispatch import (
    SCORES_MAX,
    FreenessDispatch,
    LeastLoaded,
    LeastRequests,
    PowerOfTwo,
    RoundRobin,
)
from llumnix.policies.registry import selection_policy
from llumnix.policies.selection import Cheapest

CONFIG = SchedulerConfig()


def test_the_freest_instance_is_chosen_and_the_scores_are_told() -> None:
    candidates = (view("b"), running("a", 30, 30))
    decision = FreenessDispatch(CONFIG).place(request(), candidates)
    assert decision.instance_id == "b"
    assert decision.scores == (("b", 100.0), ("a", 20.0))
    assert decision.reason == "freest"


def test_an_instance_with_room_for_the_prompt_is_preferred_to_a_freer_one_without() -> None:
    small, large = view("a", capacity_blocks=30), running("b", *[20] * 20, capacity_blocks=900)
    assert small.queue_freeness > large.queue_freeness
    decision = FreenessDispatch(CONFIG).place(request(40), (small, large))
    assert decision.instance_id == "b"
    assert "40" in decision.reason


def test_where_nobody_has_room_the_freest_takes_it_to_its_queue() -> None:
    decision = FreenessDispatch(CONFIG).place(request(500), (view("a"), running("b", 30)))
    assert decision.instance_id == "a"
    assert "wait" in decision.reason


def test_scores_are_bounded() -> None:
    many = tuple(view(f"i{number:02}") for number in range(50))
    assert len(FreenessDispatch(CONFIG).place(request(), many).scores) == SCORES_MAX


def test_round_robin_takes_turns_by_id_and_copes_with_comings_and_goings() -> None:
    policy = RoundRobin(CONFIG)
    three = (running("c"), running("a", 90), running("b", 10))
    assert [policy.place(request(), three).instance_id for _ in range(4)] == ["a", "b", "c", "a"]
    assert policy.place(request(), (three[0],)).instance_id == "c"
    assert policy.place(request(), three).instance_id == "a"


def test_load_counts_memory_in_use_queued_and_on_its_way_as_a_share_of_what_there_is() -> None:
    policy = LeastLoaded(CONFIG)
    assert policy.score(running("a", 30, 30)) == -0.6
    assert policy.score(view("b", used_blocks=10, waiting=2, waiting_blocks=55)) == -0.65
    assert policy.score(view("c", used_blocks=10, placed_blocks=40, placed_requests=1)) == -0.5
    assert policy.score(view("d", used_blocks=60, capacity_blocks=600)) == -0.1
    many_small, few_large = running("e", *[1] * 50), running("f", 80)
    assert policy.score(many_small) > policy.score(few_large), "the batch does not count, memory does"
    decision = policy.place(request(), (many_small, few_large))
    assert (decision.instance_id, decision.scores) == ("e", (("e", -0.5), ("f", -0.8)))
    assert "50%" in decision.reason


def test_least_requests_counts_heads() -> None:
    policy = LeastRequests(CONFIG)
    busy = view("a", running=3, waiting=2, placed_requests=1, migrating_in=2, migrating_out=1)
    assert policy.score(busy) == -7
    decision = policy.place(request(), (running("b", 99), busy))
    assert (decision.instance_id, decision.scores) == ("b", (("b", -1.0), ("a", -7.0)))


def test_power_of_two_takes_the_freer_of_two_distinct_ones_drawn_by_the_id() -> None:
    policy = PowerOfTwo(CONFIG)
    many = tuple(view(f"i{number:02}") for number in range(20))
    chosen: Counter[str | None] = Counter()
    for number in range(4000):
        named = request()._replace(request_id=f"r{number}")
        decision = policy.place(named, many)
        (better, _), (worse, _) = decision.scores
        assert better < worse, "the earlier candidate, and never one twice"
        assert decision == policy.place(named, many), "no chance but the id"
        chosen[decision.instance_id] += 1
    # The k-th freest of n wins with probability 2 (n - k) / (n (n - 1)).
    assert chosen["i00"] > 320 and "i19" not in chosen
    assert abs(chosen["i10"] - 4000 * 2 * 9 / 380) < 60
    assert policy.place(request(), many[:1]).instance_id == "i00"


def test_cheapest_offers_low_priority_first_then_no_kv_then_few_blocks_then_id() -> None:
    rows = [
        MoveCandidate("high", 1, 1, False),
        MoveCandidate("big", 9, 0, False),
        MoveCandidate("b", 2, 0, False),
        MoveCandidate("a", 2, 0, False),
        MoveCandidate("queued", 50, 0, True),
    ]
    ids = [row.request_id for row in Cheapest(CONFIG).select(rows, 4)]
    assert ids == ["queued", "a", "b", "big"]
    assert Cheapest(CONFIG).select(rows, 9)[-1].request_id == "high"
    assert Cheapest(CONFIG).select((), 3) == ()


def test_what_a_leaving_request_still_holds_is_no_room_for_a_newcomer() -> None:
    """Otherwise a short prompt waits until the leaving request's KV has been copied."""
    emptying = running("a", 60, 36, leaving_blocks=60, migrating_out=1)
    other = running("b", 50, 10)
    assert emptying.queue_freeness > other.queue_freeness
    decision = FreenessDispatch(SchedulerConfig()).place(request(8), (emptying, other))
    assert decision.instance_id == "b" and decision.reason == "freest with 8 free blocks and to spare"


def test_room_that_leaves_the_batch_little_is_taken_only_where_there_is_no_other() -> None:
    """What the engine keeps for its batch to grow is not told: a short prompt into the last blocks would wait
    until the leaving request is gone."""
    emptying = running("a", 60, 30, leaving_blocks=60, migrating_out=1)
    other, full = running("b", 40, 10), running("b", 50, 41)
    assert emptying.queue_freeness > other.queue_freeness
    policy = FreenessDispatch(SchedulerConfig())
    assert policy.place(request(2), (emptying, other)).instance_id == "b"
    decision = policy.place(request(2), (emptying, full))
    assert decision.instance_id == "a" and decision.reason == "freest with 2 free blocks"


def test_headroom_is_not_to_spare() -> None:
    """An instance kept clear for urgent requests is none to turn to before others are full."""
    narrow = running("a", *[30] * 3)
    clear = running("b", 66, execution_priorities=((1, 1),))
    assert narrow.queue_freeness > clear.queue_freeness
    assert FreenessDispatch(SchedulerConfig()).place(request(2), (narrow, clear)).instance_id == "a"


ROWS = [
    MoveCandidate("high", 1, 1, False, 10, 4, 9.0),
    MoveCandidate("b", 5, 0, False, 70, 9, 5.0),
    MoveCandidate("a", 9, 0, False, 130, 9, 1.0),
    MoveCandidate("c", 2, 0, False, 20, 9, 3.0),
    MoveCandidate("q2", 3, 1, True, 40, 0, 6.0),
    MoveCandidate("q1", 4, 0, True, 50, 0, 7.0),
]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("cheapest", ["q1", "c", "b", "a", "q2", "high"]),
        ("shortest", ["c", "q1", "b", "a", "high", "q2"]),
        ("longest", ["a", "b", "q1", "c", "q2", "high"]),
        ("last-come", ["q1", "b", "c", "a", "high", "q2"]),
        ("first-waiting", ["q2", "q1", "c", "b", "a", "high"]),
    ],
)
def test_selections_by_name(name: str, order: list[str]) -> None:
    policy = selection_policy(SchedulerConfig(selection_policy=name))
    assert [row.request_id for row in policy.select(ROWS, 9)] == order
    assert [row.request_id for row in policy.select(ROWS, 2)] == order[:2]
    assert policy.select((), 2) == ()
