"""How heads of queues that lack blocks are let in while all are full: by blocks that lie idle elsewhere."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import running

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceRole, InstanceState
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.views import ClusterSnapshot, InstanceView, Move
from llumnix.policies.pairing import DefragmentPairing, FreenessPairing
from llumnix.policies.room import make_room

CONFIG = SchedulerConfig(low_freeness=2.0, high_freeness=8.0, room_patience_s=60.0)
NOW = 100.0


def stuck(instance_id: str, *blocks: int, head: int, since: float = 90.0, **changes: object) -> InstanceView:
    """An instance that runs requests of so many blocks and whose queue's head needs more than is free."""
    made = running(instance_id, *blocks, head_blocks=head, waiting_blocks=head, waiting=1, **changes)
    missing = head - (made.capacity_blocks - sum(blocks))
    assert missing > 0
    queued = MoveCandidate(f"{instance_id}q", head, 0, True, arrived_at=since)
    return made._replace(
        candidates=(queued, *made.candidates),
        head_missing_blocks=missing,
        head_arrived_at=since,
        head_since=since,
    )


def room(
    *views: InstanceView,
    config: SchedulerConfig = CONFIG,
    resting: tuple[str, ...] = (),
    closed: tuple[str, ...] = (),
    busy: tuple[str, ...] = (),
    most: int = 16,
) -> list[tuple[str, str, str]]:
    snapshot = ClusterSnapshot(NOW, views, frozenset(resting), frozenset(closed))
    return [(one.request_id, one.source_id, one.target_id) for one in make_room(snapshot, config, busy, most)]


def test_nothing_moves_where_no_head_lacks_blocks() -> None:
    fits = running("a", 60, head_blocks=30, waiting_blocks=30, waiting=1)
    assert room(fits, running("b", 10)) == []


def test_a_head_goes_where_it_is_admitted_at_once() -> None:
    assert room(stuck("a", 60, head=50), running("b", 40)) == [("aq", "a", "b")]
    # b keeps two blocks for each that runs, the newcomer too: 4 of 54.
    assert room(stuck("a", 60, head=50), running("b", 46)) == [("aq", "a", "b")]
    assert room(stuck("a", 60, head=51), running("b", 46)) == []


def test_a_head_overtakes_no_older_one_by_moving() -> None:
    younger, older = stuck("b", 40, head=70, since=95.0), stuck("b", 40, head=70, since=85.0)
    assert room(stuck("a", 80, head=50, since=90.0), younger) == [("aq", "a", "b")]
    assert room(stuck("a", 80, head=50, since=90.0), older) == []


def test_a_head_that_would_wait_behind_one_about_to_be_admitted_stays() -> None:
    """Blocks that b's own queue, or a placement on its way there, takes next are none of a's."""
    own = running("b", 20, head_blocks=40, waiting_blocks=40, waiting=1)._replace(head_since=0.0)
    assert room(stuck("a", 60, head=50), own) == []
    assert room(stuck("a", 60, head=50), running("b", 20, placed_blocks=40, placed_requests=1)) == []


def test_who_waits_behind_the_head_goes_on_too_by_its_own_arrival() -> None:
    """The second came five seconds after the head: before b's head it goes first, after it not."""
    second = MoveCandidate("second", 10, 0, True, arrived_at=95.0)
    source = stuck("a", 60, head=80, since=90.0)
    source = source._replace(candidates=(*source.candidates, second))
    assert room(source, stuck("b", 70, head=90, since=96.0)) == [("second", "a", "b")]
    assert room(source, stuck("b", 70, head=90, since=94.0)) == []


def test_running_requests_make_way_by_no_more_than_is_needed() -> None:
    """The head fits nowhere else. It lacks 25 blocks: the smallest request of at least that leaves."""
    source = stuck("a", 10, 27, 48, head=40)
    assert source.head_missing_blocks == 25
    assert room(source, running("b", 66)) == [("a1", "a", "b")]


def test_several_make_way_if_none_is_enough() -> None:
    source = stuck("a", 12, 14, 16, 50, head=38)  # lacks 30
    assert room(source, running("b", 70), running("c", 72)) == [("a2", "a", "b"), ("a1", "a", "c")]
    # They leave one after the other in the same round only as far as an instance may give.
    few = replace(CONFIG, moves_per_instance_max=1)
    assert room(source, running("b", 70), running("c", 72), config=few) == [("a2", "a", "b")]


def test_nobody_makes_way_if_it_would_not_be_enough() -> None:
    source = stuck("a", 12, 14, 16, 50, head=38)
    assert room(source, running("b", 80)) == [], "16 go there, 30 are lacking"
    assert room(stuck("a", 95, head=40), running("b", 70)) == [], "the only one is too large for b"


def test_what_is_leaving_already_counts() -> None:
    source = stuck("a", 12, 14, 16, 50, head=38)
    assert room(source._replace(leaving_blocks=30), running("b", 50)) == []
    assert room(source._replace(leaving_blocks=16), running("b", 69)) == [("a1", "a", "b")]


def test_a_gap_is_what_is_free_beside_arrivals_growth_and_headroom() -> None:
    source, target = stuck("a", 30, 65, head=34), running("b", 66)  # lacks 29, b has 30 beside 2 for each
    assert room(source, target) == [("a0", "a", "b")]
    assert room(source, target._replace(arriving_blocks=1)) == []
    assert room(source, target._replace(execution_priorities=((1, 1),), headroom_blocks=1)) == []
    assert room(source, target._replace(migrating_in=1)) == [], "one more that grows there"


def test_who_may_not_move_does_not() -> None:
    source, target = stuck("a", 30, 65, head=34), running("b", 66)
    assert room(source, target, resting=("a0",)) == []
    assert room(source, target, closed=("b",)) == []
    assert room(source, target, busy=("a",)) == [] and room(source, target, busy=("b",)) == []
    assert room(source, target, most=0) == []
    assert room(source, target._replace(state=InstanceState.DRAINING)) == []
    assert room(source._replace(state=InstanceState.DRAINING), target) == []
    assert room(source._replace(migrating_out=4), target) == []
    assert room(source, target._replace(migrating_in=4)) == []
    assert room(source, target._replace(role=InstanceRole.PREFILL)) == []
    urgent = [one._replace(execution_priority=1) for one in source.candidates]
    assert room(source._replace(candidates=tuple(urgent)), target) == []
    adapted = [one._replace(adapter="sql") for one in source.candidates]
    assert room(source._replace(candidates=tuple(adapted)), target) == []
    assert room(source._replace(candidates=tuple(adapted)), target._replace(adapters=("sql",))) != []


def test_a_waiting_request_that_rests_stays_and_once_one_has_gone_nobody_makes_way() -> None:
    source, target = stuck("a", 30, 45, head=50), running("b", 46)
    assert room(source, target) == [("aq", "a", "b")], "not a0 besides, which would fit into c"
    assert room(source, target, running("c", 60)) == [("aq", "a", "b")]
    assert room(source, target, resting=("aq",)) == [("a0", "a", "b")]


def test_an_instance_takes_no_more_at_a_time_than_it_may() -> None:
    source, rest = stuck("a", 5, 5, 5, 5, 60, head=40), ("aq", "cq")  # lacks 20: four of five blocks
    four = [(f"a{number}", "a", "b") for number in range(4)]
    assert room(source, running("b", 50), resting=rest) == four
    busy = running("b", 50, migrating_in=2)
    assert room(source, busy, resting=rest) == four[:2], "the others in later rounds"
    assert room(source, busy._replace(migrating_in=4), resting=rest) == []
    less = stuck("c", 5, 5, 60, head=40)  # lacks 10
    first = [("c0", "c", "b"), ("c1", "c", "b")]
    assert room(source, less, running("b", 50), resting=rest) == [*first, *four[:2]]


def test_who_lacks_least_comes_first_until_one_has_waited_too_long() -> None:
    less = stuck("a", 29, 66, head=34, since=90.0)
    more, late = (stuck("b", 30, 69, head=31, since=since) for since in (80.0, 30.0))
    assert (less.head_missing_blocks, more.head_missing_blocks) == (29, 30)
    one_gap = running("c", 66)
    assert room(less, more, one_gap) == [("a0", "a", "c")]
    assert room(less, late, one_gap) == [("b0", "b", "c")]


def test_the_blocks_of_a_head_that_has_waited_too_long_are_kept_for_it() -> None:
    source = stuck("a", 30, 65, head=34, since=50.0)
    assert room(source, stuck("b", 66, head=90, since=41.0)) == [("a0", "a", "b")], "59 s: not yet"
    assert room(source, stuck("b", 66, head=90, since=39.0)) == []
    older = stuck("a", 30, 65, head=34, since=38.0)
    assert ("a0", "a", "b") in room(older, stuck("b", 66, head=90, since=39.0)), "an older one may"


def urgent(view: InstanceView) -> InstanceView:
    """The same with a head of scheduling priority 1."""
    first = view.candidates[0]._replace(scheduling_priority=1)
    return view._replace(candidates=(first, *view.candidates[1:]), head_priority=1)


def test_heads_of_higher_priority_come_first() -> None:
    less, more = stuck("a", 29, 66, head=34, since=30.0), stuck("b", 30, 69, head=31, since=95.0)
    one_gap = running("c", 66)
    assert room(less, more, one_gap) == [("a0", "a", "c")]
    assert room(less, urgent(more), one_gap) == [("b0", "b", "c")]
    assert room(urgent(less), urgent(more), one_gap) == [("a0", "a", "c")]


def test_the_blocks_of_a_head_serve_none_of_lower_priority() -> None:
    source, target = stuck("a", 30, 65, head=34), stuck("b", 66, head=90, since=95.0)
    assert room(source, target) == [("a0", "a", "b")]
    assert room(source, urgent(target)) == []
    assert room(urgent(source), urgent(target)) == [("a0", "a", "b")]
    late = stuck("b", 66, head=90, since=10.0)
    assert room(source, late) == [] and room(urgent(source), late) == [("a0", "a", "b")]


def test_an_urgent_request_goes_before_older_ones_that_wait_elsewhere() -> None:
    older = stuck("b", 40, head=70, since=85.0)
    assert room(stuck("a", 80, head=50), older) == []
    assert room(urgent(stuck("a", 80, head=50)), older) == [("aq", "a", "b")]
    assert room(stuck("a", 80, head=50, since=80.0), urgent(older)) == []


def test_since_when_a_request_waits_follows_from_its_instances_own_clock() -> None:
    """That clock is far from the manager's; only differences on one clock are taken."""
    second = MoveCandidate("second", 10, 0, True, arrived_at=7005.0)
    source = stuck("a", 60, head=80, since=90.0)._replace(head_arrived_at=7000.0)
    source = source._replace(candidates=(*source.candidates[1:], second))
    assert room(source, stuck("b", 70, head=90, since=96.0)) == [("second", "a", "b")]
    assert room(source, stuck("b", 70, head=90, since=94.0)) == []


def test_a_round_of_either_pairing_makes_room_where_all_are_below_the_marks() -> None:
    views = (stuck("a", 30, 65, head=34), stuck("b", 66, head=90, since=95.0))
    for policy in (FreenessPairing(CONFIG), DefragmentPairing(CONFIG)):
        moves = policy.pair(ClusterSnapshot(NOW, views, frozenset()))
        assert [(move.request_id, move.target_id) for move in moves] == [("a0", "b")]
        assert "lacks 29 blocks" in moves[0].reason
        assert dict(moves[0].scores) == {one.instance_id: one.queue_freeness for one in views}


@st.composite
def full_clusters(draw: st.DrawFn) -> tuple[InstanceView, ...]:
    views = []
    for number in range(draw(st.integers(2, 8))):
        blocks = draw(st.lists(st.integers(1, 60), min_size=1, max_size=8))
        since = float(draw(st.integers(0, 99)))
        free = draw(st.integers(0, 40))
        made = running(f"i{number}", *blocks, capacity_blocks=sum(blocks) + free)
        if draw(st.booleans()):
            made = stuck(
                f"i{number}",
                *blocks,
                head=free + draw(st.integers(1, 30)),
                since=since,
                capacity_blocks=sum(blocks) + free,
            )
        views.append(made)
    return tuple(views)


@given(full_clusters(), st.integers(1, 16))
@settings(max_examples=200, deadline=None)
def test_every_plan_keeps_the_rules(views: tuple[InstanceView, ...], most: int) -> None:
    snapshot = ClusterSnapshot(NOW, views, frozenset())
    moves = make_room(snapshot, CONFIG, (), most)
    assert moves == make_room(snapshot, CONFIG, (), most), "the same view gives the same plan"
    assert len(moves) <= most
    by_id = {view.instance_id: view for view in views}
    assert not {move.source_id for move in moves} & {move.target_id for move in moves}
    assert len({move.request_id for move in moves}) == len(moves)
    for target_id in {move.target_id for move in moves}:
        target = by_id[target_id]
        came = [_candidate(by_id, move) for move in moves if move.target_id == target_id]
        free = target.capacity_blocks - target.used_blocks - sum(one.blocks for one in came)
        assert free >= CONFIG.low_freeness * (target.running + len(came)), "those that run can grow"
    for source_id in {move.source_id for move in moves}:
        source = by_id[source_id]
        gone = [_candidate(by_id, move) for move in moves if move.source_id == source_id]
        held = sum(one.blocks for one in gone if not one.waiting)
        most_left = CONFIG.moves_per_instance_max - len(gone)
        assert gone[0].waiting or held >= source.head_missing_blocks or not most_left or len(moves) == most


def _candidate(by_id: dict[str, InstanceView], move: Move) -> MoveCandidate:
    return next(one for one in by_id[move.source_id].candidates if one.request_id == move.request_id)
