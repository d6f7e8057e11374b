"""Runs merge whatever the order, byte offsets follow the layout, and the cheapest rung is taken."""

import random

import numpy as np
import pytest

from llumnix.instance.copy_ladder import (
    CopyCost,
    CopyLadder,
    PoolShape,
    Rung,
    byte_copies,
    paired_runs,
    taken_apart,
)


@pytest.mark.parametrize(
    ("device", "host", "runs"),
    [
        ([5], [9], [[5, 9, 1]]),
        ([3, 4, 5], [7, 8, 9], [[3, 7, 3]]),
        ([5, 4, 3], [9, 8, 7], [[3, 7, 3]]),
        ([3, 4, 5], [9, 8, 7], [[3, 9, 1], [4, 8, 1], [5, 7, 1]]),
        ([3, 4, 8, 9], [1, 2, 3, 4], [[3, 1, 2], [8, 3, 2]]),
        ([3, 4, 5, 6], [1, 2, 7, 8], [[3, 1, 2], [5, 7, 2]]),
        ([9, 2, 8, 3], [5, 0, 4, 1], [[2, 0, 2], [8, 4, 2]]),
    ],
)
def test_what_lies_together_on_both_sides_is_one_run(
    device: list[int], host: list[int], runs: list[list[int]]
) -> None:
    assert paired_runs(device, host).tolist() == runs


@pytest.mark.parametrize("seed", range(20))
def test_runs_cover_each_pair_once(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 60)
    device, host = rng.sample(range(80), count), rng.sample(range(80), count)
    covered = taken_apart(paired_runs(device, host))
    assert sorted(map(tuple, covered[:, :2].tolist())) == sorted(zip(device, host, strict=True))


SHAPES = {
    "block first": lambda blocks: PoolShape.block_first(24),
    "block first, in pieces": lambda blocks: PoolShape.block_first_pieces(24, 4),
    "layer first": lambda blocks: PoolShape.layer_first(24, 4, blocks),
}


@pytest.mark.parametrize(("layout", "copies"), [("block first", 2), ("block first, in pieces", 20)])
def test_bytes_land_where_the_layout_says(layout: str, copies: int) -> None:
    shape = SHAPES[layout](16)
    device, host = np.arange(16 * 24) % 251, np.zeros(16 * 24, dtype=np.int64)
    rows = byte_copies(paired_runs([2, 3, 4, 9, 10], [7, 8, 9, 0, 1]), shape, shape)
    assert len(rows) == copies
    for device_at, host_at, size in rows:
        host[host_at : host_at + size] = device[device_at : device_at + size]
    blocks = host.reshape(16, 24)
    assert (blocks[[7, 8, 9, 0, 1]] == device.reshape(16, 24)[[2, 3, 4, 9, 10]]).all()
    assert not blocks[[2, 3, 4, 5, 6, 10, 11, 12, 13, 14, 15]].any()


def test_a_layer_first_pool_takes_one_copy_per_run_and_plane() -> None:
    device, host = PoolShape.layer_first(24, 4, 16), PoolShape.layer_first(24, 4, 32)
    rows = byte_copies(paired_runs([2, 3, 4], [7, 8, 9]), device, host)
    assert rows.tolist() == [[plane * 96 + 2 * 6, plane * 192 + 7 * 6, 18] for plane in range(4)]


COSTS = {
    Rung.RUN: CopyCost(0.0, 10e-6, 1e-9),
    Rung.STAGING: CopyCost(50e-6, 0.0, 2e-9),
    Rung.BLOCK: CopyCost(0.0, 10e-6, 1e-9),
    Rung.PIECE: CopyCost(0.0, 10e-6, 1e-9),
}


def test_few_long_runs_are_copied_and_many_short_ones_staged() -> None:
    ladder = CopyLadder(COSTS, (Rung.RUN, Rung.STAGING), block_bytes=1000, planes=8)
    assert ladder.choose(blocks=100, runs=2) is Rung.RUN
    assert ladder.choose(blocks=100, runs=100) is Rung.STAGING
    assert ladder.cost_s(100, 2) == pytest.approx(20e-6 + 100e-6)
    assert ladder.cost_s(100, 100) == pytest.approx(50e-6 + 200e-6)


def test_only_rungs_that_are_allowed_and_there_are_taken() -> None:
    ladder = CopyLadder(COSTS, (Rung.BATCH, Rung.PIECE), block_bytes=1000, planes=8)
    assert ladder.choose(100, 1) is Rung.PIECE
    assert ladder.copies(Rung.PIECE, 100, 1) == 800
    assert ladder.cost_s(100, 1) == pytest.approx(800 * 10e-6 + 100e-6)
    with pytest.raises(ValueError, match="rung"):
        CopyLadder(COSTS, (Rung.BATCH,), 1000, 8)
