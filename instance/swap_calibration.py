"""What each rung of the copy ladder costs on this machine, measured once when an instance starts.

A job's time is taken as linear in its copies and its bytes, and the three constants follow from three kinds
of job: one small copy, many small copies, one large copy. The pools themselves are copied, different blocks
each time, before anything lies in them. A rung whose bytes do not arrive is left out. Called by swap lanes.
"""

import logging
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from llumnix.instance.copy_ladder import CopyCost, PoolShape, Rows, Rung, byte_copies, taken_apart
from llumnix.kernels.copies import Mover

log = logging.getLogger(__name__)

LARGE_BYTES = 8 << 20
SMALL_COPIES = 64
REPEATS = 5


def calibrate(mover: Mover, device_pool: Tensor, host_pool: Tensor, *, to_host: bool) -> dict[Rung, CopyCost]:
    """The cost of every rung that works here. The pools, uint8 ``[blocks, block_bytes]``, are all zeros
    before and after."""
    probe = _Probe(mover, device_pool, host_pool, to_host=to_host)
    costs: dict[Rung, CopyCost] = {}
    for rung in (Rung.RUN, Rung.BATCH, Rung.STAGING):
        if rung is Rung.BATCH and not mover.batches:
            continue
        if probe.arrives(rung):
            costs[rung] = probe.cost(rung)
        else:
            log.warning("swapping by %s does not work here and is left out", rung.value)
    if Rung.RUN in costs:  # finer rungs submit copies in the same way, only more of them
        costs[Rung.BLOCK] = costs[Rung.PIECE] = costs[Rung.RUN]
    return costs


def move(mover: Mover, rung: Rung, runs: Rows, shapes: tuple[PoolShape, PoolShape]) -> None:
    """Do a job's runs on a rung: rows ``[device, host, count]``, shapes of device and host pool."""
    if rung is Rung.STAGING:
        blocks = taken_apart(runs)
        mover.move_staged(np.ascontiguousarray(blocks[:, 0]), np.ascontiguousarray(blocks[:, 1]))
        return
    if rung in (Rung.PIECE, Rung.BLOCK):
        runs = taken_apart(runs)
    copies = byte_copies(runs, *shapes)
    if rung is Rung.BATCH:
        mover.move_batch(copies)
    else:
        mover.move_each(copies)


class _Probe:
    def __init__(self, mover: Mover, device_pool: Tensor, host_pool: Tensor, *, to_host: bool) -> None:
        self._mover = mover
        self._source, self._target = (device_pool, host_pool) if to_host else (host_pool, device_pool)
        self._blocks = min(len(device_pool), len(host_pool))
        self._block_bytes = host_pool.shape[1]
        shape = PoolShape.block_first(self._block_bytes)
        self._shapes = (shape, shape)
        self._next = 0

    def arrives(self, rung: Rung) -> bool:
        """Whether a pattern gets across."""
        block = self._blocks - 1
        pattern = torch.arange(self._block_bytes).remainder(251).to(torch.uint8)
        self._source[block].copy_(pattern)
        try:
            move(self._mover, rung, np.array([[block, block, 1]]), self._shapes)
            return torch.equal(self._target[block].cpu(), pattern)
        except RuntimeError as error:
            log.warning("swapping by %s: %s", rung.value, error)
            return False
        finally:
            for pool in (self._source, self._target):
                pool[block].zero_()
                if pool.is_cuda:
                    torch.cuda.synchronize(pool.device)  # the next copy comes on another stream

    def cost(self, rung: Rung) -> CopyCost:
        large = max(1, min(self._blocks, LARGE_BYTES // self._block_bytes))
        many = max(1, min(self._blocks // 2, SMALL_COPIES))
        one_s = self._best(rung, 1, 1)
        large_s = self._best(rung, 1, large)
        byte_s = max(0.0, large_s - one_s) / max(1, (large - 1) * self._block_bytes)
        if large == 1:
            byte_s = one_s / self._block_bytes
        overhead_s = max(0.0, one_s - byte_s * self._block_bytes)
        if rung is Rung.STAGING or many == 1:
            return CopyCost(overhead_s, 0.0, byte_s)
        many_s = self._best(rung, many, 1)
        copy_s = max(0.0, many_s - one_s) / (many - 1) - byte_s * self._block_bytes
        copy_s = min(overhead_s, max(0.0, copy_s))
        return CopyCost(overhead_s - copy_s, copy_s, byte_s)

    def _best(self, rung: Rung, runs: int, length: int) -> float:
        """Seconds of a job of so many runs, no two of which touch."""
        times = []
        for _ in range(REPEATS):
            stride = length + 1 if runs > 1 else length
            if self._next + runs * stride > self._blocks:
                self._next = 0
            firsts = np.arange(runs) * stride + self._next
            self._next += runs * stride
            rows = np.stack((firsts, firsts, np.full(runs, length)), axis=1)
            began = perf_counter()
            move(self._mover, rung, rows, self._shapes)
            times.append(perf_counter() - began)
        return min(times)
