"""Blocks are free, owned or reserved, each exactly once, and lie together where they can."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.core.errors import InvariantError
from llumnix.instance.block_manager import BlockManager
from llumnix.instance.free_runs import FreeRuns, runs_of


def runs(blocks: list[int]) -> list[tuple[int, int]]:
    return list(runs_of(blocks))


def test_runs_of_joins_consecutive_ids_in_order() -> None:
    assert runs([4, 5, 6, 2, 3, 9]) == [(4, 3), (2, 2), (9, 1)]
    assert runs([3, 2, 1]) == [(3, 1), (2, 1), (1, 1)]
    assert runs([]) == []


def test_growth_is_all_or_nothing() -> None:
    blocks = BlockManager(4)
    assert blocks.grow("a", 3)
    assert not blocks.grow("b", 2)
    assert blocks.free_blocks == 1 and blocks.owned_blocks == 3
    assert blocks.grow("b", 1)
    blocks.check()


def test_growing_requests_stay_contiguous_while_there_is_room() -> None:
    blocks = BlockManager(64)
    for _ in range(6):
        for request_id in ("a", "b", "c"):
            assert blocks.grow(request_id, 1)
    for request_id in ("a", "b", "c"):
        assert len(runs(blocks.table(request_id))) == 1


def test_a_split_pool_is_used_to_the_last_block() -> None:
    blocks = BlockManager(8)
    for request_id in "abcdefgh":
        assert blocks.grow(request_id, 1)
    for request_id in "aceg":
        blocks.free(request_id)
    assert blocks.grow("scattered", 4)
    assert blocks.free_blocks == 0
    blocks.check()


def test_freed_neighbours_merge_into_one_run() -> None:
    blocks = BlockManager(30)
    for request_id in ("a", "b", "c", "d"):
        assert blocks.grow(request_id, 7)
    for request_id in ("c", "a", "d", "b"):
        blocks.free(request_id)
        blocks.check()
    assert blocks.free_runs() == [(0, 30)]


def test_trim_frees_the_tail_only() -> None:
    blocks = BlockManager(8)
    blocks.grow("a", 5)
    kept = blocks.table("a")[:2]
    blocks.trim("a", 2)
    assert blocks.table("a") == kept and blocks.free_blocks == 6
    blocks.check()


def test_a_reservation_grows_keeps_its_order_and_is_adopted() -> None:
    blocks = BlockManager(8)
    first = blocks.reserve("m", 2)
    more = blocks.reserve("m", 5)
    assert first is not None and more is not None and more[:2] == first and len(more) == 5
    assert blocks.reserve("m", 3) == more, "never shrunk"
    assert blocks.reserve("m", 9) is None and blocks.reserve("n", 4) is None
    assert (blocks.reserved("m"), blocks.reserved_blocks, blocks.reservations) == (5, 5, 1)
    blocks.adopt("m", "a")
    assert tuple(blocks.table("a")) == more
    assert (blocks.reserved_blocks, blocks.owned_blocks, blocks.reservations) == (0, 5, 0)
    blocks.check()


def test_an_empty_reservation_holds_nothing() -> None:
    blocks = BlockManager(2)
    assert blocks.reserve("m", 0) == ()
    assert blocks.reservations == 0
    blocks.cancel("m")
    blocks.check()


def test_adopting_over_held_blocks_is_a_bug() -> None:
    blocks = BlockManager(4)
    blocks.grow("a", 1)
    blocks.reserve("m", 1)
    with pytest.raises(InvariantError):
        blocks.adopt("m", "a")
    blocks.check()


def test_taking_more_than_is_free_is_a_bug() -> None:
    with pytest.raises(InvariantError):
        FreeRuns(3).take(4, after=None)


def test_check_notices_a_lost_block() -> None:
    blocks = BlockManager(4)
    blocks.grow("a", 2)
    blocks.table("a").pop()
    with pytest.raises(InvariantError):
        blocks.check()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["grow", "free", "reserve", "cancel", "adopt", "trim"]),
        st.integers(0, 5),
        st.integers(0, 12),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(capacity=st.integers(1, 40), steps=STEPS)
def test_accepts_and_refuses_like_a_plain_free_list(capacity: int, steps: list[tuple[str, int, int]]) -> None:
    """The model is a counter of free blocks: contiguity must never cost a block."""
    blocks = BlockManager(capacity)
    free, owned, reserved = capacity, dict[str, int](), dict[str, int]()
    for action, who, count in steps:
        request_id, migration_id = f"r{who}", f"m{who}"
        if action == "grow":
            assert blocks.grow(request_id, count) == (count <= free)
            if count <= free:
                owned[request_id] = owned.get(request_id, 0) + count
                free -= count
        elif action == "free":
            blocks.free(request_id)
            free += owned.pop(request_id, 0)
        elif action == "trim" and request_id in owned:
            blocks.trim(request_id, count)
            keep = min(count, owned[request_id])
            free += owned[request_id] - keep
            owned[request_id] = keep
        elif action == "reserve":
            missing = max(0, count - reserved.get(migration_id, 0))
            held = blocks.reserve(migration_id, count)
            assert (held is not None) == (missing <= free)
            if held is not None and missing:
                reserved[migration_id] = reserved.get(migration_id, 0) + missing
                free -= missing
        elif action == "cancel":
            blocks.cancel(migration_id)
            free += reserved.pop(migration_id, 0)
        elif action == "adopt" and migration_id in reserved and request_id not in owned:
            blocks.adopt(migration_id, request_id)
            owned[request_id] = reserved.pop(migration_id)
        blocks.check()
        assert blocks.free_blocks == free
        assert blocks.owned_blocks == sum(owned.values())
        assert blocks.reserved_blocks == sum(reserved.values())
