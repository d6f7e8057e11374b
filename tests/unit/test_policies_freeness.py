"""Freeness against Algorithm 1 worked by hand, and the estimate of an instance after a move."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from llumnix.core.messages.load import MoveCandidate
from llumnix.policies.freeness import Load, headroom

IDLE = Load(100, 0, 0, 0, 0, 0, 0, 0, (), False)


def load(**changes: object) -> Load:
    return IDLE._replace(**changes)  # type: ignore[arg-type]


def test_free_blocks_are_shared_by_the_batch() -> None:
    assert load(used_blocks=60, batch=4).freeness(32) == 10.0
    assert IDLE.freeness(32) == 100.0


def test_the_waiting_head_counts_and_the_rest_of_the_queue_does_not() -> None:
    queue = load(used_blocks=60, batch=4, head_blocks=50, queued_blocks=300, waiting=6)
    assert queue.freeness(32) == -2.5
    assert queue.queue_freeness(32) == -260.0


def test_each_priority_above_zero_keeps_its_headroom_once() -> None:
    assert headroom(((0, 5), (1, 3), (2, 1), (3, 0)), 32) == 64
    assert load(used_blocks=20, batch=4, priorities=((0, 3), (1, 1))).freeness(32) == 12.0


def test_draining_is_a_request_without_end() -> None:
    assert load(draining=True).freeness(32) == -inf
    assert load(draining=True).queue_freeness(32) == -inf


def test_placed_requests_count_as_if_they_had_come() -> None:
    assert load(used_blocks=20, batch=2, placed_blocks=20, placed_requests=4).freeness(32) == 10.0


def test_a_long_queue_is_worse_than_a_short_one_whatever_the_batch() -> None:
    lone = load(used_blocks=100, batch=1, head_blocks=10, queued_blocks=10, waiting=1)
    crowd = load(used_blocks=100, batch=50, head_blocks=10, queued_blocks=300, waiting=30)
    assert lone.queue_freeness(32) > crowd.queue_freeness(32)


def test_a_running_request_takes_its_blocks_and_its_priority_along() -> None:
    candidate = MoveCandidate("r", 30, 1, False)
    source = load(used_blocks=90, batch=3, priorities=((0, 2), (1, 1)))
    assert source.without(candidate) == load(used_blocks=60, batch=2, priorities=((0, 2),))
    assert IDLE.joined(candidate, 30) == load(used_blocks=30, batch=1, priorities=((1, 1),))


def test_the_next_in_line_becomes_the_head() -> None:
    candidate = MoveCandidate("r", 40, 0, True)
    source = load(head_blocks=40, queued_blocks=100, waiting=4)
    assert source.without(candidate) == load(head_blocks=20, queued_blocks=60, waiting=3)
    assert IDLE.joined(candidate, 40) == load(head_blocks=40, queued_blocks=40, waiting=1)
    behind = MoveCandidate("s", 30, 0, True)
    assert source.without(behind) == load(head_blocks=40, queued_blocks=70, waiting=3)


def test_a_waiting_request_of_unstated_size_counts_as_the_mean() -> None:
    assert load(queued_blocks=100, waiting=3).demand(MoveCandidate("r", 0, 0, True)) == 34


loads = st.builds(
    Load,
    capacity_blocks=st.integers(1, 500),
    used_blocks=st.integers(0, 500),
    head_blocks=st.integers(0, 100),
    queued_blocks=st.integers(100, 900),
    placed_blocks=st.integers(0, 100),
    batch=st.integers(1, 40),
    waiting=st.integers(1, 40),
    placed_requests=st.integers(0, 10),
    priorities=st.just(()),
    draining=st.just(False),
)


@given(loads, st.integers(1, 100), st.booleans())
def test_giving_a_request_away_never_makes_an_instance_less_free(
    before: Load, blocks: int, waiting: bool
) -> None:
    candidate = MoveCandidate("r", min(blocks, before.used_blocks), 0, waiting)
    assert before.without(candidate).queue_freeness(0) >= before.queue_freeness(0)
    assert before.joined(candidate, blocks).queue_freeness(0) <= before.queue_freeness(0)
