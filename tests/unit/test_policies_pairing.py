"""Which requests move: marks, benefit, capacity, rest, draining; and that rounds come to rest."""

from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import HEADROOM, running, view

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceState
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.views import ClusterSnapshot, InstanceView, Move
from llumnix.policies.freeness import Load
from llumnix.policies.pairing import DefragmentPairing, DrainPairing, FreenessPairing, NoPairing

CONFIG = SchedulerConfig(low_freeness=4.0, high_freeness=8.0)
FULL = (24, 24, 24, 24)


def pair(
    *views: InstanceView, resting: tuple[str, ...] = (), closed: tuple[str, ...] = ()
) -> tuple[Move, ...]:
    return FreenessPairing(CONFIG).pair(ClusterSnapshot(0.0, views, frozenset(resting), frozenset(closed)))


def routes(moves: tuple[Move, ...]) -> list[tuple[str, str, str]]:
    return [(move.request_id, move.source_id, move.target_id) for move in moves]


def test_a_full_instance_gives_to_an_empty_one() -> None:
    moves = pair(running("a", *FULL), view("b"))
    assert routes(moves)[0] == ("a0", "a", "b")
    assert "freeness a" in moves[0].reason


def test_nothing_moves_between_the_marks() -> None:
    between = running("b", 35, 35)  # 15 blocks each left: above the high mark
    assert pair(running("a", 40, 40), between) == ()  # 10 each: above the low mark
    assert pair(running("a", *FULL), running("b", 20, 20, 20, 16)) == ()  # 6 each: below the high mark


def test_a_move_that_would_only_swap_the_roles_is_not_made() -> None:
    lone = running("a", 97)  # 3 blocks left for one request: under the mark, but b would be as full
    assert pair(lone, view("b", capacity_blocks=99)) == ()


def test_the_target_stays_above_the_low_mark() -> None:
    assert routes(pair(running("a", 8, 92), running("b", 80))) == [("a0", "a", "b")]
    assert pair(running("a", 14, 86), running("b", 80)) == ()  # better for the worse side, but b ends at 3


def test_the_target_must_have_room_for_one_block_more() -> None:
    source = running("a", 50, 47)
    big_only = source._replace(candidates=source.candidates[:1])
    assert pair(big_only, running("b", 51, capacity_blocks=101)) == ()


def test_a_move_that_helps_nobody_is_not_made() -> None:
    """Giving away a request without blocks leaves an overloaded instance as overloaded."""
    overloaded = running("a", 100, head_blocks=50, waiting_blocks=50, waiting=1)
    overloaded = overloaded._replace(candidates=(MoveCandidate("empty", 0, 0, False),))
    assert pair(overloaded, view("b")) == ()


def test_who_took_from_a_draining_instance_gives_nothing_in_the_same_round() -> None:
    draining = running("a", 40, state=InstanceState.DRAINING)
    low = running("b", *[7] * 30, capacity_blocks=300)  # 3 steps left, but the only one with 40 blocks
    high = view("c", capacity_blocks=30)
    assert routes(pair(low, high)) != []
    assert routes(pair(draining, low, high)) == [("a0", "a", "b")]


def test_resting_requests_and_closed_targets_are_left_alone() -> None:
    full = running("a", *FULL)
    assert "a0" not in [move.request_id for move in pair(full, view("b"), resting=("a0",))]
    assert pair(full, view("b"), resting=("a0", "a1", "a2", "a3")) == ()
    assert {move.target_id for move in pair(full, view("b"), view("c"), closed=("b",))} == {"c"}


def test_lowest_is_paired_with_highest() -> None:
    worst, bad = running("a", 33, 33, 33), running("b", *FULL)
    free, freest = running("c", 30), view("d")
    moves = pair(worst, bad, free, freest)
    assert (moves[0].source_id, moves[0].target_id) == ("a", "d")
    assert (moves[1].source_id, moves[1].target_id) == ("b", "c")


def test_a_blocked_head_pushes_others_away() -> None:
    """Defragmentation: half the memory is free on each, but a's queue head needs more than a has."""
    blocked = running("a", 25, 25, head_blocks=70, waiting_blocks=70, waiting=1)
    assert blocked.freeness < 0
    assert pair(blocked, running("b", 20, 20))[0].source_id == "a"


def test_a_waiting_request_moves_when_its_instance_offers_it() -> None:
    queued = MoveCandidate("q", 30, 0, True)
    full = running("a", 90, head_blocks=30, waiting_blocks=90, waiting=3)
    full = full._replace(candidates=(queued, *full.candidates))
    assert routes(pair(full, view("b")))[0] == ("q", "a", "b")


def test_draining_instances_give_whatever_their_freeness_and_take_nothing() -> None:
    draining = running("a", 5, state=InstanceState.DRAINING)
    assert routes(pair(draining, running("b", 20))) == [("a0", "a", "b")]
    assert pair(running("c", *FULL), draining) == ()


def test_draining_does_not_overload_anybody() -> None:
    draining = running("a", 50, state=InstanceState.DRAINING)
    assert pair(draining, running("b", 60)) == ()
    assert pair(draining, view("b", state=InstanceState.SILENT)) == ()


def test_moves_of_one_round_and_of_one_instance_are_bounded() -> None:
    full = [running(f"a{number}", *[3] * 33) for number in range(10)]
    empty = [view(f"b{number}", capacity_blocks=1000) for number in range(10)]
    moves = pair(*full, *empty)
    assert len(moves) == CONFIG.moves_per_round_max
    busy = running("a", *FULL, migrating_out=CONFIG.moves_per_instance_max)
    assert pair(busy, view("b")) == ()
    assert pair(running("a", *FULL), view("b", migrating_in=CONFIG.moves_per_instance_max)) == ()


def test_no_pairing_moves_nothing() -> None:
    snapshot = ClusterSnapshot(0.0, (running("a", *FULL), view("b")), frozenset())
    assert NoPairing(CONFIG).pair(snapshot) == ()


@st.composite
def clusters(draw: st.DrawFn) -> tuple[InstanceView, ...]:
    views = []
    for number in range(draw(st.integers(2, 8))):
        blocks = draw(st.lists(st.integers(1, 40), max_size=12))
        queue = draw(st.lists(st.integers(1, 40), max_size=4))
        state = draw(st.sampled_from((*[InstanceState.SERVING] * 4, *InstanceState)))
        made = running(
            f"i{number}",
            *blocks,
            capacity_blocks=draw(st.integers(50, 300)),
            head_blocks=queue[0] if queue else 0,
            waiting_blocks=sum(queue),
            waiting=len(queue),
            state=state,
        )
        queued = tuple(MoveCandidate(f"q{number}-{k}", size, 0, True) for k, size in enumerate(queue))
        views.append(made._replace(candidates=(*queued, *made.candidates)[:8]))
    return tuple(views)


@given(clusters())
@settings(max_examples=150, deadline=None)
def test_every_round_keeps_the_rules(views: tuple[InstanceView, ...]) -> None:
    moves = pair(*views)
    by_id = {one.instance_id: one for one in views}
    sources, targets = {move.source_id for move in moves}, {move.target_id for move in moves}
    assert not sources & targets
    assert len({move.request_id for move in moves}) == len(moves)
    assert all(by_id[one].state in (InstanceState.SERVING, InstanceState.DRAINING) for one in sources)
    assert all(by_id[one].state is InstanceState.SERVING for one in targets)
    loads = {one.instance_id: Load.of(one) for one in views}
    for move in moves:
        source = by_id[move.source_id]
        candidate = next(one for one in source.candidates if one.request_id == move.request_id)
        before = min(loads[side].queue_freeness(HEADROOM) for side in (move.source_id, move.target_id))
        assert loads[move.target_id].free_blocks > candidate.blocks
        loads[move.source_id] = loads[move.source_id].without(candidate)
        loads[move.target_id] = loads[move.target_id].joined(candidate, candidate.blocks)
        if source.state is InstanceState.SERVING:
            after = min(loads[side].queue_freeness(HEADROOM) for side in (move.source_id, move.target_id))
            assert after > before
            assert loads[move.target_id].queue_freeness(HEADROOM) > CONFIG.low_freeness
            assert source.freeness < CONFIG.low_freeness
            assert by_id[move.target_id].freeness > CONFIG.high_freeness
    assert pair(*views) == moves  # the same view gives the same round


def blocked(instance_id: str, *blocks: int, head: int) -> InstanceView:
    """An instance whose head of the queue waits for blocks, if it lacks any."""
    made = running(instance_id, *blocks, head_blocks=head, waiting_blocks=head, waiting=1)
    missing = max(0, head - (made.capacity_blocks - made.used_blocks))
    candidates = (MoveCandidate(f"{instance_id}q", head, 0, True), *made.candidates)
    return made._replace(candidates=candidates, head_missing_blocks=missing)


def test_drain_moves_what_drains_and_nothing_else() -> None:
    emptied = running("a", 10, 10)._replace(state=InstanceState.DRAINING)
    snapshot = ClusterSnapshot(0.0, (emptied, running("b", *FULL), view("c")), frozenset())
    moves = DrainPairing(CONFIG).pair(snapshot)
    assert {move.source_id for move in moves} == {"a"} and len(moves) == 2


def defragment(*views: InstanceView) -> list[tuple[str, str, str]]:
    return routes(DefragmentPairing(CONFIG).pair(ClusterSnapshot(0.0, views, frozenset())))


def test_defragment_finds_the_head_of_the_queue_its_room() -> None:
    assert defragment(blocked("a", 40, 30, head=50), view("b")) == [("aq", "a", "b")]
    # Where the head itself fits nowhere, something smaller makes way for it.
    assert defragment(blocked("a", 25, 30, head=50), running("b", 60)) == [("a0", "a", "b")]


def test_defragment_leaves_balance_alone() -> None:
    assert defragment(running("a", *FULL), view("b")) == []
    assert pair(running("a", *FULL), view("b")) != ()
    assert defragment(blocked("a", 40, 10, head=50), view("b")) == [], "its head fits and is admitted next"


def urgent_on(instance_id: str, high: int, *normal: int) -> InstanceView:
    """An instance that runs an urgent request ``<id>high`` of so many blocks, offered last, and others."""
    made = running(instance_id, *normal)
    candidates = (*made.candidates, MoveCandidate(f"{instance_id}high", high, 1, False))
    counts = ((0, len(normal)), (1, 1)) if normal else ((1, 1),)
    return view(
        instance_id,
        used_blocks=high + sum(normal),
        running=len(normal) + 1,
        candidates=candidates,
        execution_priorities=counts,
    )


def test_headroom_does_not_drive_away_those_it_is_kept_for() -> None:
    clear = urgent_on("a", 66)  # 34 blocks free, 32 of them headroom: under the low mark
    assert pair(clear, view("b")) == ()
    crowded = urgent_on("a", 40, 26)
    assert routes(pair(crowded, view("b"))) == [("a0", "a", "b")]
    full = urgent_on("a", 98)  # by itself
    assert routes(pair(full, view("b", capacity_blocks=200))) == [("ahigh", "a", "b")]


def test_urgent_requests_are_brought_to_where_headroom_is_kept() -> None:
    stray = urgent_on("a", 10, 20, 20)._replace(headroom_blocks=0)
    assert routes(pair(stray, urgent_on("b", 10), view("c"))) == [("ahigh", "a", "b")]
    assert pair(stray, urgent_on("b", 30, 20)) == (), "it would run no better there"
    assert pair(stray, view("c")) == (), "none is kept anywhere"
    assert pair(stray, urgent_on("b", 10), resting=("ahigh",)) == ()


def test_who_gave_takes_nothing_in_the_same_round() -> None:
    crowded = urgent_on("b", 30, 24, 6)  # gives one to "c" for the headroom it keeps
    stray = urgent_on("a", 10, 30, 30, 10)._replace(headroom_blocks=0)
    assert routes(pair(crowded, view("c"))) == [("b0", "b", "c")]
    assert routes(pair(stray, crowded)) == [("ahigh", "a", "b")]
    moves = routes(pair(stray, crowded, view("c")))
    assert ("b0", "b", "c") in moves and all(target != "b" for _, _, target in moves)


def test_an_urgent_request_that_leaves_for_balance_is_not_gathered_as_well() -> None:
    urgent = (MoveCandidate("a0", 48, 1, False), MoveCandidate("a1", 48, 1, False))
    stray = view("a", used_blocks=96, running=2, candidates=urgent, execution_priorities=((1, 2),))
    clear = view("c", capacity_blocks=1000, used_blocks=10, running=1, execution_priorities=((1, 1),))
    moves = routes(pair(stray._replace(headroom_blocks=0), clear))
    assert ("a0", "a", "c") in moves and len({request_id for request_id, _, _ in moves}) == len(moves)
