"""Copying between two pools that this process can both address: its own, or a peer's that it has mapped.

On a CPU runs are copied by kernels/cpu/copy.c, without the interpreter lock and past the caches. The engines
of both sides compute on the same cores meanwhile, so a copy that nobody waits for takes ``copy_share`` of the
time only. On a GPU a run is a device copy, on the copy thread's own stream.
"""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from llumnix.core.errors import TransportError
from llumnix.kernels.cpu.compiled import load_library
from llumnix.migration.transports.bandwidth import TokenBucket
from llumnix.migration.transports.base import BlockPool, ReadStats
from llumnix.migration.transports.runs import Run, plan_runs

PIECE_BYTES = 16 << 20
"""What is copied before a closed reader or the bandwidth cap is looked at again."""


@dataclass(frozen=True, slots=True)
class SourceMemory:
    """Where a source's blocks lie: from ``address`` on for host memory that ``owner`` keeps mapped, in
    ``owner`` itself, uint8 ``[blocks, block_bytes]``, on a GPU."""

    blocks: int
    address: int
    owner: object


class MemoryReader:
    """A BlockReader over memory. A read under way keeps the source mapped; it is given back after the
    last one."""

    def __init__(self, source: SourceMemory, pool: BlockPool, bucket: TokenBucket, copy_share: float) -> None:
        self._source: SourceMemory | None = source
        self._pool = pool
        self._bucket = bucket
        self._copy_share = copy_share

    def read(
        self,
        source_blocks: Sequence[int],
        target_blocks: Sequence[int],
        timeout_s: float,
        *,
        urgent: bool = False,
        rests: bool = True,
    ) -> ReadStats:
        started = perf_counter()
        source = self._opened()
        if source_blocks and max(source_blocks) >= source.blocks:
            raise TransportError(f"source block {max(source_blocks)} of a pool of {source.blocks}")
        target, block_bytes = self._pool.bytes_view(), self._pool.layout.block_bytes
        piece = max(1, self._bucket.chunk_bytes(PIECE_BYTES) // block_bytes)
        runs = plan_runs(source_blocks, target_blocks, target_total=len(target), blocks_max=piece)
        share = self._copy_share if rests and not urgent else 1.0
        copying_s = 0.0
        for batch in _batches(runs, piece):
            self._bucket.pass_bytes(sum(run.count for run in batch) * block_bytes, urgent=urgent)
            self._opened()
            if target.is_cuda:
                copying_s += _copy_on_device(source, target, batch)
            else:
                copying_s += _copy_on_host(source, target, batch, block_bytes, share)
        kv_bytes = len(source_blocks) * block_bytes
        return ReadStats(kv_bytes, len(runs), perf_counter() - started, copying_s)

    def close(self) -> None:
        self._source = None

    def _opened(self) -> SourceMemory:
        if self._source is None:
            raise TransportError("the reader is closed")
        return self._source


def _batches(runs: Sequence[Run], blocks_max: int) -> Iterator[list[Run]]:
    """Consecutive runs, in groups of at most ``blocks_max`` blocks; no run is longer."""
    batch: list[Run] = []
    blocks = 0
    for run in runs:
        if blocks + run.count > blocks_max and batch:
            yield batch
            batch, blocks = [], 0
        batch.append(run)
        blocks += run.count
    if batch:
        yield batch


def _copy_on_host(
    source: SourceMemory, target: torch.Tensor, runs: Sequence[Run], block_bytes: int, share: float
) -> float:
    """Returns the seconds spent copying. Without the C library a plain copy, as fast as it goes."""
    library = load_library()
    if library is not None:
        table = np.array([(run.source, run.target, run.count) for run in runs], dtype=np.int64)
        spent_ns = library.llumnix_copy_runs(
            target.data_ptr(), source.address, table.ctypes.data, len(runs), block_bytes, share
        )
        return float(spent_ns) / 1e9
    started = perf_counter()
    for run in runs:
        ctypes.memmove(
            target.data_ptr() + run.target * block_bytes,
            source.address + run.source * block_bytes,
            run.count * block_bytes,
        )
    return perf_counter() - started


def _copy_on_device(source: SourceMemory, target: torch.Tensor, runs: Sequence[Run]) -> float:
    if not isinstance(source.owner, torch.Tensor):
        raise TransportError("the source's pool is not on a GPU")
    started = perf_counter()
    for run in runs:
        rows = source.owner[run.source : run.source + run.count]
        target[run.target : run.target + run.count].copy_(rows, non_blocking=True)
    torch.cuda.current_stream(target.device).synchronize()
    return perf_counter() - started
