"""Copying between two pools that this process can both address: its own, or a peer's that it has mapped.

On a CPU a run is one plain memory copy without the interpreter lock, so that the engine thread goes on.
On a GPU it is a device copy, on the copy thread's own stream.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from llumnix.core.errors import TransportError
from llumnix.migration.transports.bandwidth import SMALL_READ_BYTES, TokenBucket
from llumnix.migration.transports.base import BlockPool, ReadStats
from llumnix.migration.transports.runs import Run, plan_runs

PIECE_BYTES = 64 << 20


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

    def __init__(self, source: SourceMemory, pool: BlockPool, bucket: TokenBucket) -> None:
        self._source: SourceMemory | None = source
        self._pool = pool
        self._bucket = bucket

    def read(self, source_blocks: Sequence[int], target_blocks: Sequence[int], timeout_s: float) -> ReadStats:
        started = perf_counter()
        source = self._source
        if source is None:
            raise TransportError("the reader is closed")
        if source_blocks and max(source_blocks) >= source.blocks:
            raise TransportError(f"source block {max(source_blocks)} of a pool of {source.blocks}")
        target, block_bytes = self._pool.bytes_view(), self._pool.layout.block_bytes
        piece = max(1, self._bucket.chunk_bytes(PIECE_BYTES) // block_bytes)
        runs = plan_runs(source_blocks, target_blocks, target_total=len(target), blocks_max=piece)
        kv_bytes = len(source_blocks) * block_bytes
        copy = _copy_on_device if isinstance(source.owner, torch.Tensor) and target.is_cuda else _copy_on_host
        for run in runs:
            self._bucket.pass_bytes(run.count * block_bytes, small=kv_bytes <= SMALL_READ_BYTES)
            copy(source, target, run, block_bytes)
        if target.is_cuda:
            torch.cuda.current_stream(target.device).synchronize()
        return ReadStats(kv_bytes, len(runs), perf_counter() - started)

    def close(self) -> None:
        self._source = None


def _copy_on_host(source: SourceMemory, target: torch.Tensor, run: Run, block_bytes: int) -> None:
    ctypes.memmove(
        target.data_ptr() + run.target * block_bytes,
        source.address + run.source * block_bytes,
        run.count * block_bytes,
    )


def _copy_on_device(source: SourceMemory, target: torch.Tensor, run: Run, block_bytes: int) -> None:
    if not isinstance(source.owner, torch.Tensor):
        raise TransportError("the source's pool is not on a GPU")
    rows = source.owner[run.source : run.source + run.count]
    target[run.target : run.target + run.count].copy_(rows, non_blocking=True)
