"""Blocks are free, owned or reserved, each exactly once, and lie together where they can."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.bench.block_churn import BlockChurn
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
        FreeRuns(3).carve(0, 0, 4)


def test_a_tail_is_taken_back_when_space_is_short() -> None:
    blocks = BlockManager(12)
    assert blocks.grow("a", 2) and blocks.grow("b", 8)
    assert blocks.free_blocks == 2 and blocks.grow("c", 2)
    assert blocks.free_runs() == [] and not blocks.grow("a", 1)
    blocks.check()


def test_growth_uses_up_the_group_before_it_takes_another() -> None:
    blocks = BlockManager(100)
    blocks.grow("a", 3, expected=5)
    blocks.grow("b", 3, expected=5)
    for _ in range(5):
        blocks.grow("b", 1, expected=5)
        blocks.grow("a", 1, expected=5)
    assert runs(blocks.table("a")) == [(0, 8)] and runs(blocks.table("b")) == [(8, 8)]


def test_runs_stay_long_in_a_full_pool() -> None:
    """A plain free list gives runs of one block here."""
    grouped = BlockChurn(BlockManager(3000), seed=1).run(1000, 2000)
    assert grouped.fill > 0.88 and grouped.swaps > 100
    assert grouped.mean_run >= 15
    scattered = BlockChurn(BlockManager(3000, grouped=False), seed=1).run(1000, 2000)
    assert scattered.swaps == grouped.swaps and scattered.mean_run < 2


def test_blocks_that_a_copy_uses_go_out_last_and_are_to_be_waited_for() -> None:
    blocks = BlockManager(8)
    blocks.grow("a", 4)
    blocks.copy_begins(7, blocks.table("a"))
    blocks.free("a")
    assert (blocks.free_blocks, blocks.idle_blocks) == (8, 4)
    assert blocks.reserve("m", 5) is None, "a migration's writes could not wait"
    blocks.grow("b", 4)
    assert not blocks.conflicts
    blocks.grow("b", 1)
    assert blocks.conflicts == {7} and len(set(blocks.table("b"))) == 5
    blocks.check()
    blocks.copy_ends(7, range(4))
    assert (blocks.free_blocks, blocks.idle_blocks) == (3, 3)
    blocks.check()


def test_a_later_copy_of_a_block_is_the_one_to_wait_for() -> None:
    blocks = BlockManager(2)
    blocks.grow("a", 2)
    blocks.copy_begins(1, [0, 1])
    blocks.free("a")
    blocks.grow("b", 2)
    blocks.copy_begins(2, [0, 1])
    blocks.copy_ends(1, [0, 1])
    blocks.free("b")
    assert blocks.idle_blocks == 0
    blocks.copy_ends(2, [0, 1])
    assert blocks.idle_blocks == 2
    blocks.check()


def test_check_notices_a_lost_block() -> None:
    blocks = BlockManager(4)
    blocks.grow("a", 2)
    blocks.table("a").pop()
    with pytest.raises(InvariantError):
        blocks.check()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["grow", "free", "reserve", "cancel", "adopt", "trim", "copy", "copied", "inherit"]),
        st.integers(0, 5),
        st.integers(0, 12),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(capacity=st.integers(1, 40), grouped=st.booleans(), steps=STEPS)
def test_accepts_and_refuses_like_a_plain_free_list(
    capacity: int, grouped: bool, steps: list[tuple[str, int, int]]
) -> None:
    """The model is a counter of free blocks: neither contiguity nor copies under way may cost a block."""
    blocks = BlockManager(capacity, grouped=grouped)
    copies: list[list[int]] = []
    free, owned, reserved = capacity, dict[str, int](), dict[str, int]()
    for action, who, count in steps:
        request_id, migration_id = f"r{who}", f"m{who}"
        if action == "grow":
            assert blocks.grow(request_id, count, expected=who) == (count <= free)
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
            idle = blocks.idle_blocks
            held = blocks.reserve(migration_id, count)
            assert (held is not None) == (missing <= idle)
            if held is not None and missing:
                reserved[migration_id] = reserved.get(migration_id, 0) + missing
                free -= missing
        elif action == "cancel":
            blocks.cancel(migration_id)
            free += reserved.pop(migration_id, 0)
        elif action == "adopt" and migration_id in reserved and request_id not in owned:
            blocks.adopt(migration_id, request_id)
            owned[request_id] = reserved.pop(migration_id)
        elif action == "copy" and owned.get(request_id):
            copies.append(blocks.table(request_id)[:count])
            blocks.copy_begins(len(copies), copies[-1])
        elif action == "copied" and 0 < count <= len(copies):
            blocks.copy_ends(count, copies[count - 1])
        elif action == "inherit" and request_id in owned and "heir" not in owned:
            blocks.hand_over(request_id, "heir")
            owned["heir"] = owned.pop(request_id)
        blocks.check()
        assert blocks.free_blocks == free
        assert blocks.owned_blocks == sum(owned.values())
        assert blocks.reserved_blocks == sum(reserved.values())
