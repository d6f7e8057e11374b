"""The copies of one swap, measured: layout × allocation, against one copy of the same bytes.

Block tables come from real block managers under churn (block_churn.py), one for the device and one for the
host; bytes are moved by what the copier uses. A layer-first pool is the same memory with a tensor per layer
for keys and one for values, as most engines have it. All rows take turns, each swap is another request's, and
the single copies are of other places every time, so that neither a disturbance nor a warm cache favours
anybody.
"""

import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch

from llumnix.bench.block_churn import BlockChurn
from llumnix.core.config import SwapConfig
from llumnix.core.messages.control import KvLayout
from llumnix.instance.block_manager import BlockManager
from llumnix.instance.copy_ladder import PoolShape, Rows, Rung, byte_copies, paired_runs
from llumnix.instance.kv_pool import KvPool, host_pool
from llumnix.instance.swap import SwapDirection, SwapJob
from llumnix.instance.swap_calibration import move
from llumnix.instance.swap_copier import SwapCopier
from llumnix.kernels.copies import Mover, mover

FILL = 0.9
WARM_UP_TICKS = 4000
HOST_KEPT = 24  # swapped-out requests on the host at a time
LAYOUTS = ("block_first", "layer_first")
ALLOCATIONS = ("grouped", "scattered")


@dataclass(frozen=True, slots=True)
class Transfer:
    """Swaps of ``blocks`` blocks in one layout and allocation, ``copies`` of them on average; ``submission``:
    whether copies were submitted one by one or as a batch. ``gb_s`` at the median swap-out.
    ``share_of_one_copy``: the median, over swaps, of the time of one copy of as many bytes, submitted in the
    same way, over the swap's, both directions."""

    layout: str
    allocation: str
    submission: str
    blocks: int
    copies: float
    bytes_per_copy: float
    plan_us_p50: float
    swap_out_ms_p50: float
    swap_in_ms_p50: float
    gb_s: float
    share_of_one_copy: float


@dataclass(slots=True)
class _Times:
    """Of one layout, allocation and submission: lists with an entry per swap."""

    copies: list[int] = field(default_factory=list)
    plan_s: list[float] = field(default_factory=list)
    out_s: list[float] = field(default_factory=list)
    in_s: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


Pairs = tuple[list[int], list[int]]


def swapped_tables(layout: KvLayout, blocks: int, *, grouped: bool, seed: int) -> Iterator[Pairs]:
    """The first ``blocks`` device and host blocks of requests that have as many, swapped out one after the
    other while the device pool is 90 % full: endless. The host pool is as large as the device's."""
    churn = BlockChurn(BlockManager(layout.blocks, grouped=grouped), seed=seed, fill=FILL)
    host = BlockManager(layout.blocks, grouped=grouped)
    kept: deque[str] = deque()
    number = tick = 0
    while True:
        for table in churn.tick():
            number += 1
            while len(kept) >= HOST_KEPT or len(table) > host.free_blocks:
                host.free(kept.popleft())
            kept.append(f"h{number}")
            host.grow(f"h{number}", len(table), 0)
            if tick >= WARM_UP_TICKS and len(table) >= blocks:
                yield table[:blocks], host.table(f"h{number}")[:blocks]
        tick += 1


def measure_transfers(
    layout: KvLayout, device: torch.device, *, blocks: int, repeats: int, seed: int
) -> list[Transfer]:
    """One row per layout, allocation and way of submission."""
    pool = KvPool(layout, "bench-swap", device)
    host = host_pool(SwapConfig(host_blocks=layout.blocks), pool)
    assert host is not None
    movers = [mover(pool.bytes_view(), host.bytes_view(), to_host=to_host) for to_host in (True, False)]
    tables = {
        allocation: swapped_tables(layout, blocks, grouped=allocation == "grouped", seed=seed)
        for allocation in ALLOCATIONS
    }
    rungs = [Rung.RUN] + ([Rung.BATCH] if movers[0].batches else [])
    keys = [(name, where, rung) for name in LAYOUTS for where in ALLOCATIONS for rung in rungs]
    times = {key: _Times() for key in keys}
    places = np.random.default_rng(seed)
    for repeat in range(repeats + 1):
        for key in keys:
            name, allocation, rung = key
            plain = places.integers(0, layout.blocks - blocks, 2) * layout.block_bytes
            whole = np.array([[*plain, blocks * layout.block_bytes]])
            taken = times[key] if repeat else _Times()  # the first round touches everything once
            _swap(taken, _shape(layout, name), next(tables[allocation]), rung, movers, whole)
    pool.close()
    host.close()
    return [_row(*key, taken, blocks, layout.block_bytes) for key, taken in times.items()]


def _shape(layout: KvLayout, name: str) -> PoolShape:
    if name == "block_first":
        return PoolShape.block_first(layout.block_bytes)
    return PoolShape.layer_first(layout.block_bytes, 2 * layout.layers, layout.blocks)


def _swap(
    times: _Times, shape: PoolShape, pairs: Pairs, rung: Rung, movers: Sequence[Mover], whole: Rows
) -> None:
    """One swap out and in, each after one copy of as many bytes."""
    began = perf_counter()
    runs = paired_runs(*pairs)
    times.copies.append(len(byte_copies(runs, shape, shape)))
    times.plan_s.append(perf_counter() - began)
    one_s = 0.0
    for direction, seconds in zip(movers, (times.out_s, times.in_s), strict=True):
        began = perf_counter()
        (direction.move_batch if rung is Rung.BATCH else direction.move_each)(whole)
        one_s += perf_counter() - began
        began = perf_counter()
        move(direction, rung, runs, (shape, shape))
        seconds.append(perf_counter() - began)
    times.shares.append(one_s / (times.out_s[-1] + times.in_s[-1]))


def _row(layout: str, allocation: str, rung: Rung, times: _Times, blocks: int, block_bytes: int) -> Transfer:
    size_bytes, copies = blocks * block_bytes, statistics.mean(times.copies)
    return Transfer(
        layout=layout,
        allocation=allocation,
        submission="batch" if rung is Rung.BATCH else "each",
        blocks=blocks,
        copies=copies,
        bytes_per_copy=size_bytes / copies,
        plan_us_p50=statistics.median(times.plan_s) * 1e6,
        swap_out_ms_p50=statistics.median(times.out_s) * 1e3,
        swap_in_ms_p50=statistics.median(times.in_s) * 1e3,
        gb_s=size_bytes / statistics.median(times.out_s) / 1e9,
        share_of_one_copy=statistics.median(times.shares),
    )


def submission_us(
    layout: KvLayout, device: torch.device, *, blocks: int, repeats: int, seed: int
) -> dict[str, float]:
    """What handing one swap to the copier costs the engine's thread, and until it is done, at the median."""
    pool = KvPool(layout, "bench-swap", device)
    config = SwapConfig(host_blocks=layout.blocks)
    host = host_pool(config, pool)
    assert host is not None
    copier = SwapCopier(pool, host, config)
    tables = swapped_tables(layout, blocks, grouped=True, seed=seed)
    begin_s, done_s = [], []
    for number in range(repeats):
        there, here = next(tables)
        job = SwapJob(number, "bench", SwapDirection.OUT, tuple(there), tuple(here))
        began = perf_counter()
        copier.begin([job])
        begin_s.append(perf_counter() - began)
        copier.wait([number])
        done_s.append(perf_counter() - began)
        copier.done()
    copier.close()
    pool.close()
    host.close()
    return {
        "begin_us_p50": statistics.median(begin_s) * 1e6,
        "until_done_ms_p50": statistics.median(done_s) * 1e3,
    }
