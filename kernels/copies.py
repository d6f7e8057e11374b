"""Moves bytes between a device pool and a host pool, in one direction: what the rungs of the copy ladder do.

Every method returns when the bytes have arrived, and waits without the interpreter's lock. An object belongs
to one thread. On a CPU both pools are host memory and a copy is a memcpy; on a GPU the host pool is pinned
and copies run on a stream of their own. Called by the swap copier, its calibration and benchmarks.
"""

import ctypes
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llumnix.kernels import ops
from llumnix.kernels.cpu.compiled import load_library

STAGING_BYTES = 16 << 20

Rows = NDArray[np.int64]


class Mover(Protocol):
    """Pools are uint8 ``[blocks, block_bytes]``; offsets count from their first byte."""

    @property
    def batches(self) -> bool:
        """Whether ``move_batch`` is there."""
        ...

    def move_each(self, copies: Rows) -> None:
        """Rows ``[device offset, host offset, bytes]``, submitted one by one."""
        ...

    def move_batch(self, copies: Rows) -> None:
        """The same in one submission."""
        ...

    def move_staged(self, device_blocks: Rows, host_blocks: Rows) -> None:
        """Whole blocks, through a contiguous buffer."""
        ...


def mover(device_pool: Tensor, host_pool: Tensor, *, to_host: bool) -> Mover:
    """What moves blocks between these pools in this direction."""
    if device_pool.is_cuda:
        from llumnix.kernels.gpu.copies import CudaMover  # a CPU needs none of it

        return CudaMover(device_pool, host_pool, to_host=to_host)
    return HostMover(device_pool, host_pool, to_host=to_host)


class HostMover:
    """Both pools in host memory."""

    def __init__(self, device_pool: Tensor, host_pool: Tensor, *, to_host: bool) -> None:
        self._device, self._host, self._to_host = device_pool, host_pool, to_host
        rows = max(1, STAGING_BYTES // host_pool.shape[1])
        self._staging = torch.empty(min(rows, len(host_pool)), host_pool.shape[1], dtype=torch.uint8)
        self._library = load_library()

    @property
    def batches(self) -> bool:
        return self._library is not None

    def move_each(self, copies: Rows) -> None:
        device, host = self._device.data_ptr(), self._host.data_ptr()
        for device_at, host_at, size in copies.tolist():
            if self._to_host:
                ctypes.memmove(host + host_at, device + device_at, size)
            else:
                ctypes.memmove(device + device_at, host + host_at, size)

    def move_batch(self, copies: Rows) -> None:
        if self._library is None:
            raise RuntimeError("there is no C library to hand a batch to")
        device, host = self._device.data_ptr(), self._host.data_ptr()
        columns = [1, 0, 2] if self._to_host else [0, 1, 2]
        rows = np.ascontiguousarray(copies[:, columns])
        to, source = (host, device) if self._to_host else (device, host)
        self._library.llumnix_copy_bytes(to, source, rows.ctypes.data, len(rows))

    def move_staged(self, device_blocks: Rows, host_blocks: Rows) -> None:
        source, to = (self._device, self._host) if self._to_host else (self._host, self._device)
        sources, targets = (device_blocks, host_blocks) if self._to_host else (host_blocks, device_blocks)
        for start in range(0, len(sources), len(self._staging)):
            part = slice(start, start + len(self._staging))
            staging = self._staging[: len(sources[part])]
            ops.gather_blocks(source, torch.from_numpy(sources[part]), staging)
            ops.scatter_blocks(staging, torch.from_numpy(targets[part]), to)
