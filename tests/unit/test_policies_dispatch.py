"""Where new requests go, and which requests an instance offers."""

from policy_views import request, running, view

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import MoveCandidate
from llumnix.policies.dispatch import SCORES_MAX, FreenessDispatch, RoundRobin
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
