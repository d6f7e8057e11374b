"""Where the built-in policies change their minds: the last case on one side and the first on the other."""

import pytest
from policy_views import request, running, view

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceRole
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.views import ClusterSnapshot, PreemptionAction, ReliefView, VictimView
from llumnix.policies.dispatch import FreenessDispatch, LeastRequests, PowerOfTwo
from llumnix.policies.pairing import FreenessPairing
from llumnix.policies.preemption import CheapestPreemption
from llumnix.policies.relief import CheapestRelief
from llumnix.policies.roles import Disaggregate, Strict
from llumnix.policies.selection import Cheapest


@pytest.mark.parametrize(
    ("recompute_s", "action"),
    [(0.0, PreemptionAction.SWAP), (0.24, PreemptionAction.RECOMPUTE), (0.25, PreemptionAction.SWAP)],
)
def test_a_victim_is_computed_again_only_if_that_is_known_to_take_less_time(
    recompute_s: float, action: PreemptionAction
) -> None:
    victim = VictimView("v", 0, 20, 20, 2, 2, 0.125, 0.125, recompute_s)
    assert CheapestPreemption(SchedulerConfig()).decide(victim).action is action


def relieved(used_blocks: int, **victim: float) -> str | None:
    asked = {"left_s": 1.0, "loss_s": 0.5, "copy_s": 1.0, "pause_s": 0.1} | victim
    made = ReliefView(candidate=MoveCandidate("v", 10, 0, False), **asked)
    target = view("b", used_blocks=used_blocks, running=1)
    policy = CheapestRelief(SchedulerConfig(low_freeness=4.0))
    return policy.relieve(made, running("a", 90), [target]).instance_id


def test_a_victim_moves_where_freeness_stays_above_the_low_mark() -> None:
    assert relieved(80) == "b"  # 10 blocks are left then, for 2 requests
    assert relieved(82) is None


def test_a_victim_moves_if_its_copy_is_made_in_time_and_giving_way_costs_more_or_nobody_knows() -> None:
    assert relieved(0) == "b"
    assert relieved(0, copy_s=1.01) is None
    assert relieved(0, loss_s=0.1) is None
    assert relieved(0, loss_s=0.0) == "b"


def test_a_target_that_a_move_brings_under_the_high_mark_gets_no_more_in_that_round() -> None:
    source, target = running("a", *[8] * 12), running("b", *[11] * 5)
    moves = FreenessPairing(SchedulerConfig(low_freeness=4.0, high_freeness=8.0)).pair(
        ClusterSnapshot(0.0, (source, target), frozenset())
    )
    assert [(move.source_id, move.target_id) for move in moves] == [("a", "b")]


def test_a_source_gives_until_it_is_at_the_low_mark() -> None:
    """86 blocks in 4 requests: without the last of 10 it has 24 left for 3, without two 34 for 2."""
    source = running("a", 10, 10, 33, 33)
    for low, given in ((8.0, 1), (8.1, 2)):
        policy = FreenessPairing(SchedulerConfig(low_freeness=low, high_freeness=20.0))
        moves = policy.pair(ClusterSnapshot(0.0, (source, view("b"), view("c")), frozenset()))
        assert len(moves) == given, low


def test_prefill_spills_over_between_the_marks_only() -> None:
    policy = Disaggregate(SchedulerConfig(low_freeness=4.0, high_freeness=8.0))

    def spills(entry_used: int, decode_used: int, blocks: int = 2) -> bool:
        entry = view("p", used_blocks=entry_used, running=5)
        return policy.enter(request(blocks), entry, view("d", used_blocks=decode_used, running=5)).decode

    assert spills(81, 59)
    assert not spills(80, 59), "the one that prefills is at the low mark"
    assert not spills(81, 60), "the one that decodes is at the high mark"
    assert spills(81, 59, 41) and not spills(81, 59, 42)


def test_by_the_strict_policy_a_request_goes_where_a_block_more_than_its_own_is_free_or_it_waits_anyway() -> (
    None
):
    policy, source = Strict(SchedulerConfig()), view("p", role=InstanceRole.PREFILL)
    tight = view("d", role=InstanceRole.DECODE, used_blocks=90)
    for blocks, leaves in ((9, True), (10, False)):
        asked = MoveCandidate("r", blocks, 0, False)
        assert (policy.leave(asked, source, [tight]) is not None) is leaves
    waiting, neutral = MoveCandidate("r", 50, 0, True), view("n", used_blocks=90)
    move = policy.leave(waiting, source, [neutral])
    assert move is not None and (move.source_id, move.target_id) == ("p", "n")


def test_exactly_enough_room_is_room() -> None:
    freer, other = running("a", 30, 30, 30), running("b", *[10] * 8)
    policy = FreenessDispatch(SchedulerConfig())
    for blocks, chosen in ((10, "a"), (11, "b"), (20, "b"), (21, "a")):
        assert policy.place(request(blocks), (freer, other)).instance_id == chosen, blocks


def test_least_requests_tells_an_empty_instance_from_one_with_a_request() -> None:
    policy = LeastRequests(SchedulerConfig())
    scores = [policy.score(view("a", running=count)) for count in (0, 1, 2)]
    assert scores == [0.0, -1.0, -2.0]
    assert policy.score(view("a", running=3, migrating_out=2, migrating_in=1)) == -2.0


def test_of_two_candidates_the_freer_is_taken_whatever_is_drawn() -> None:
    policy, two = PowerOfTwo(SchedulerConfig()), (view("a"), view("b"))
    for number in range(20):
        assert policy.place(request()._replace(request_id=f"r{number}"), two).instance_id == "a"


def test_only_the_freest_become_targets_where_there_are_more_than_moves() -> None:
    config = SchedulerConfig(low_freeness=4.0, high_freeness=8.0, moves_per_round_max=1)
    views = (running("a", *[24] * 4), running("b", 80), running("c", 70), running("d", 60), running("e", 1))
    moves = FreenessPairing(config).pair(ClusterSnapshot(0.0, views, frozenset()))
    assert [(move.source_id, move.target_id) for move in moves] == [("a", "e")]


def test_a_waiting_request_costs_what_it_has_in_host_memory_and_a_running_one_its_blocks() -> None:
    rows = [
        MoveCandidate("w-copied", 5, 0, True, host_blocks=5),
        MoveCandidate("w-new", 9, 0, True),
        MoveCandidate("r-copied", 3, 0, False, host_blocks=3),
        MoveCandidate("r-small", 2, 0, False, host_blocks=9),
    ]
    found = Cheapest(SchedulerConfig()).select(rows, 4)
    assert [row.request_id for row in found] == ["w-new", "w-copied", "r-small", "r-copied"]
