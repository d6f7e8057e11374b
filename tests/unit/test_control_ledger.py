"""The parts under the scheduler: ledgers, ranking, backoff. Bounds and order."""

import pytest
from control_driving import ToyInstance, hello
from hypothesis import given
from hypothesis import strategies as st

from llumnix.control import ledger
from llumnix.control.backoff import REST_MAX_S, Backoff
from llumnix.control.instance_record import InstanceRecord
from llumnix.control.ledger import MoveEntry, MoveLedger, Placement, PlacementLedger
from llumnix.control.ranking import Ranking
from llumnix.core.errors import InvariantError
from llumnix.policies.freeness import Load


def placement(request_id: str, instance_id: str = "a", at: float = 0.0) -> Placement:
    return Placement(request_id, instance_id, 2, at)


def test_only_the_instance_that_was_meant_can_confirm() -> None:
    book = PlacementLedger()
    assert book.add(placement("r")) is None
    assert book.confirm("r", "b") is None
    assert book.confirm("r", "a") == placement("r")
    assert book.confirm("r", "a") is None
    assert len(book) == 0


def test_placements_expire_oldest_first() -> None:
    book = PlacementLedger()
    for number in range(5):
        book.add(placement(f"r{number}", at=float(number)))
    book.add(placement("r0", at=9.0))
    assert [one.request_id for one in book.expire(3.0)] == ["r1", "r2"]
    assert len(book) == 3


def test_placements_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "PLACEMENTS_MAX", 3)
    book = PlacementLedger()
    displaced = [book.add(placement(f"r{number}")) for number in range(5)]
    assert displaced == [None, None, None, placement("r0"), placement("r1")]


def move(number: int, source_id: str = "a", target_id: str = "b") -> MoveEntry:
    return MoveEntry(f"m{number}", f"r{number}", source_id, target_id, 4, float(number))


def test_a_request_moves_once_at_a_time() -> None:
    book = MoveLedger()
    book.add(move(1))
    with pytest.raises(InvariantError):
        book.add(MoveEntry("m2", "r1", "a", "b", 4, 0.0))
    assert book.is_moving("r1")
    assert book.end("m1", 1.0, linger=False) is not None
    assert book.end("m1", 1.0, linger=False) is None
    assert not book.is_moving("r1")
    assert len(book) == 0


def test_a_committed_move_lingers_until_both_sides_have_reported() -> None:
    book = MoveLedger()
    book.add(move(1))
    book.end("m1", 1.0, linger=True)
    assert [one.migration_id for one in book.settle("b")] == ["m1"]
    assert book.settle("b") == []
    assert len(book) == 1
    assert len(book.settle("a")) == 1
    assert len(book) == 0


def test_what_lingers_expires_and_ends_with_its_instances() -> None:
    book = MoveLedger()
    for number in (1, 2):
        book.add(move(number))
        book.end(f"m{number}", float(number), linger=True)
    assert [one.migration_id for one in book.expire(2.0)] == ["m1"]
    assert len(book) == 1
    book.detach("a")
    book.detach("b")
    assert len(book) == 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 60), st.booleans()), max_size=40))
def test_the_ranking_equals_a_sort(changes: list[tuple[str, int, bool]]) -> None:
    ranking, expected = Ranking(), {}
    for instance_id, used, remove in changes:
        if remove:
            ranking.remove(instance_id)
            expected.pop(instance_id, None)
        else:
            record = InstanceRecord(hello(instance_id), 0.0, 4)
            record.report = ToyInstance(instance_id, running={"r": used}).report()
            record.changed()
            expected[instance_id] = record.seen
            ranking.put(record, record.queue_freeness)
        ordered = sorted(expected.values(), key=lambda one: (-one.queue_freeness, one.instance_id))
        assert list(ranking) == ordered
        assert ranking[1:3] == tuple(ordered[1:3])


@given(st.integers(0, 120), st.integers(0, 30), st.integers(0, 9), st.booleans())
def test_a_record_scores_what_its_view_stands_for(used: int, placed: int, moves: int, draining: bool) -> None:
    record = InstanceRecord(hello("a"), 0.0, 4)
    record.report = ToyInstance("a", running={"r": used}, waiting={"w": 7}).report()
    record.placed_blocks, record.placed_requests = placed, placed
    record.arriving_blocks, record.arriving_requests, record.leaving_blocks = 3 * moves, moves, 2 * moves
    record.draining = draining
    record.changed()
    assert record.load == Load.of(record.seen)
    assert record.seen.queue_freeness == record.queue_freeness


def test_since_when_a_head_waits_is_on_the_managers_clock() -> None:
    record = InstanceRecord(hello("a"), 50.0, 4)
    record.report = (
        ToyInstance("a", running={"r": 95}, waiting={"w": 7})
        .report()
        ._replace(head_priority=3, head_arrived_at=7.0, head_waited_s=8.0)
    )
    record.changed()
    seen = record.seen
    assert (seen.head_missing_blocks, seen.head_priority) == (2, 3)
    assert (seen.head_arrived_at, seen.head_since) == (7.0, 42.0)


def test_running_moves_are_counted_by_side_until_they_end() -> None:
    book = MoveLedger()
    for number, target_id in ((1, "b"), (2, "c"), (3, "b")):
        book.add(move(number, target_id=target_id))
    assert [book.running_out(name) for name in "abc"] == [3, 0, 0]
    assert [book.running_in(name) for name in "abc"] == [0, 2, 1]
    book.end("m1", 1.0, linger=True)
    assert (book.running_out("a"), book.running_in("b"), book.running_in("c")) == (2, 1, 1)
    for name in ("m2", "m3"):
        book.end(name, 1.0, linger=False)
    assert [book.running_out(name) + book.running_in(name) for name in "abc"] == [0, 0, 0]


def test_the_time_between_two_ends_counts_from_the_first_report_that_shows_work() -> None:
    record = InstanceRecord(hello("a"), 0.0, 4)
    reports = [
        ToyInstance("a", running={"r": 1}).report()._replace(finished_total=ended) for ended in (0, 1, 1, 3)
    ]
    gaps = []
    for number in range(3):
        record.count_ends(reports[number], reports[number + 1], 100.0 + 4.0 * number)
        gaps.append(record.end_gap_s)
    assert gaps == [0.0, 0.0, 4.0], "two have ended in the eight seconds since"


def test_moves_that_only_the_instance_knows_of_count_as_well() -> None:
    report = ToyInstance("a", running={"r": 10, "s": 10}).report()
    for coming, going in ((2, 0), (0, 1), (3, 1)):
        record = InstanceRecord(hello("a"), 0.0, 4)
        record.report = report._replace(migrating_in=coming, migrating_out=going)
        record.changed()
        assert (record.seen.migrating_in, record.seen.migrating_out) == (coming, going)
        assert record.load == Load.of(record.seen) and record.load.batch == 2 + coming - going


def test_rests_double_with_each_failure_and_end() -> None:
    backoff = Backoff(2.0)
    assert backoff.resting(0.0) == []
    backoff.succeeded("r", 0.0)
    assert backoff.resting(1.9) == ["r"]
    assert backoff.resting(2.0) == []
    now = 10.0
    for expected_s in (2.0, 4.0, 8.0, 16.0, 32.0, REST_MAX_S, REST_MAX_S):
        backoff.failed("r", now)
        assert backoff.resting(now + expected_s - 0.1) == ["r"]
        assert backoff.resting(now + expected_s) == []
        now += expected_s
    backoff.expire(now + REST_MAX_S + 1)
    assert len(backoff) == 0
    backoff.failed("r", now)
    backoff.forgive("r")
    assert backoff.resting(now) == []


def test_an_instance_is_drained_once_it_knows_and_is_empty() -> None:
    record = InstanceRecord(hello("a"), 0.0, 4, draining=True)
    assert not record.drained
    for told, wanted, running, drained in (
        (False, True, 0, False),
        (True, False, 0, False),
        (True, True, 1, False),
        (True, True, 0, True),
    ):
        instance = ToyInstance("a", running={f"r{n}": 1 for n in range(running)}, draining=told)
        record.report, record.draining = instance.report(), wanted
        assert record.drained is drained
    for kept in ("waiting", "migrating_in", "migrating_out"):
        record.report = ToyInstance("a", draining=True).report()._replace(**{kept: 1})
        assert not record.drained, kept
