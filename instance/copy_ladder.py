"""Which copies a swap of blocks consists of, and which way of doing them is the cheapest.

A copy operation costs something however small it is, so fewer and larger ones are better. The rungs of the
ladder, from the finest: one copy per block and layer, keys and values apart (how engines with a tensor per
layer swap); one per block; one per run of blocks; all runs handed to the platform as one batch; or gathered
into a staging buffer, moved in one piece and scattered. Pure: bytes are moved by kernels/copies.py, costs are
measured by swap_calibration.py. Called by the copier and by benchmarks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


class Rung(Enum):
    """A way of doing a job's copies."""

    PIECE = "piece"
    BLOCK = "block"
    RUN = "run"
    BATCH = "batch"
    STAGING = "staging"


ALLOWED_RUNGS: Final = {
    "auto": (Rung.RUN, Rung.BATCH, Rung.STAGING),
    "run": (Rung.RUN, Rung.BATCH),
    "staging": (Rung.STAGING,),
    "block": (Rung.BLOCK,),
    "piece": (Rung.PIECE,),
}
"""Which rungs each value of ``swap_copies`` chooses from."""


@dataclass(slots=True)
class CopyTotals:
    """What was done so far in one direction; ``copies`` counts copy operations, ``busy_s`` the jobs' time."""

    jobs: int = 0
    blocks: int = 0
    copies: int = 0
    errors: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolShape:
    """Where a block's bytes lie in a pool: in ``planes`` pieces of ``piece_bytes`` each, piece p of block i
    at ``p * plane_stride + i * block_stride``."""

    planes: int
    piece_bytes: int
    plane_stride: int
    block_stride: int

    @classmethod
    def block_first(cls, block_bytes: int) -> "PoolShape":
        """A block in one piece, blocks side by side."""
        return cls(1, block_bytes, 0, block_bytes)

    @classmethod
    def block_first_pieces(cls, block_bytes: int, planes: int) -> "PoolShape":
        """The same bytes, but with each layer's keys and values looked at as a piece of their own."""
        piece = block_bytes // planes
        return cls(planes, piece, piece, block_bytes)

    @classmethod
    def layer_first(cls, block_bytes: int, planes: int, blocks: int) -> "PoolShape":
        """A tensor per layer for keys and one for values, in each of which blocks lie side by side."""
        piece = block_bytes // planes
        return cls(planes, piece, piece * blocks, piece)


def paired_runs(device_blocks: Sequence[int], host_blocks: Sequence[int]) -> Rows:
    """The fewest runs that cover pairs of blocks: rows ``[device, host, count]`` of blocks consecutive on
    both sides, by device block. The order of the pairs does not matter, so that what descends merges like
    what ascends."""
    device, host = np.asarray(device_blocks, dtype=np.int64), np.asarray(host_blocks, dtype=np.int64)
    order = np.argsort(device, kind="stable")
    device, host = device[order], host[order]
    starts = np.flatnonzero(np.concatenate(([True], (np.diff(device) != 1) | (np.diff(host) != 1))))
    counts = np.diff(np.concatenate((starts, [len(device)])))
    return np.stack((device[starts], host[starts], counts), axis=1)


def taken_apart(runs: Rows) -> Rows:
    """The same pairs of blocks with every block as a run of its own."""
    counts = runs[:, 2]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    pairs = np.repeat(runs[:, :2], counts, axis=0) + within[:, None]
    return np.concatenate((pairs, np.ones((len(pairs), 1), dtype=np.int64)), axis=1)


def byte_copies(runs: Rows, device: PoolShape, host: PoolShape) -> Rows:
    """The copies of whole runs: rows ``[device offset, host offset, bytes]``. Both shapes have the same
    planes and pieces. A run is one copy per plane where its blocks' pieces lie side by side on both sides,
    else one per block and plane."""
    if not device.block_stride == host.block_stride == device.piece_bytes:
        runs = taken_apart(runs)
    planes = np.arange(device.planes)
    copies = np.empty((len(runs), device.planes, 3), dtype=np.int64)
    copies[..., 0] = runs[:, :1] * device.block_stride + planes * device.plane_stride
    copies[..., 1] = runs[:, 1:2] * host.block_stride + planes * host.plane_stride
    copies[..., 2] = runs[:, 2:] * device.piece_bytes
    return copies.reshape(-1, 3)


@dataclass(frozen=True, slots=True)
class CopyCost:
    """Seconds of a job on one rung: ``job_s + copies * copy_s + bytes * byte_s``."""

    job_s: float
    copy_s: float
    byte_s: float

    def seconds(self, copies: int, size_bytes: int) -> float:
        """For so many copy operations of so many bytes in all."""
        return self.job_s + copies * self.copy_s + size_bytes * self.byte_s


class CopyLadder:
    """Chooses the rung of each job. ``costs`` are those of one direction, for every rung there is;
    ``allowed`` the rungs to choose from."""

    def __init__(
        self, costs: Mapping[Rung, CopyCost], allowed: Sequence[Rung], block_bytes: int, planes: int
    ) -> None:
        self._costs = {rung: costs[rung] for rung in allowed if rung in costs}
        if not self._costs:
            raise ValueError("a ladder needs a rung")
        self._block_bytes = block_bytes
        self.planes = planes

    @property
    def costs(self) -> dict[Rung, CopyCost]:
        """Of the rungs to choose from."""
        return dict(self._costs)

    def choose(self, blocks: int, runs: int) -> Rung:
        """The cheapest rung for a job."""
        return min(self._costs, key=lambda rung: (self._seconds(rung, blocks, runs), rung.value))

    def cost_s(self, blocks: int, runs: int) -> float:
        """What the cheapest rung costs."""
        return min(self._seconds(rung, blocks, runs) for rung in self._costs)

    def copies(self, rung: Rung, blocks: int, runs: int) -> int:
        """Copy operations of a job on a rung."""
        match rung:
            case Rung.PIECE:
                return blocks * self.planes
            case Rung.BLOCK:
                return blocks
            case Rung.RUN | Rung.BATCH:
                return runs
            case Rung.STAGING:
                return 1

    def _seconds(self, rung: Rung, blocks: int, runs: int) -> float:
        return self._costs[rung].seconds(self.copies(rung, blocks, runs), blocks * self._block_bytes)
