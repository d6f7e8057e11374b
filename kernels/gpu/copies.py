"""Moving bytes between a GPU's pool and pinned host memory. See ``kernels.copies.Mover``.

A batch is one call of the CUDA driver's cuMemcpyBatchAsync (driver 12.8 and later; torch offers no way to
it), found by name in the driver's library; where it is missing there are no batches. Staging gathers
scattered blocks with a Triton kernel on the GPU, so that one large copy crosses the bus.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llumnix.kernels import ops

STAGING_BYTES = 16 << 20
STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM

Rows = NDArray[np.int64]


class CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes: the order in which sources are read, two location hints, flags."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


@cache
def _batch_function() -> Any:
    """cuMemcpyBatchAsync in its first form, which newer drivers keep; None where the driver has none."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuMemcpyBatchAsync
    except (OSError, AttributeError):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer]
    function.restype = ctypes.c_int
    return function


class CudaMover:
    """One direction, on a stream of its own."""

    def __init__(self, device_pool: Tensor, host_pool: Tensor, *, to_host: bool) -> None:
        self._device, self._host, self._to_host = device_pool, host_pool, to_host
        self._stream = torch.cuda.Stream(device_pool.device)  # type: ignore[no-untyped-call]
        block_bytes = host_pool.shape[1]
        rows = min(max(1, STAGING_BYTES // block_bytes), len(host_pool))
        self._device_staging = torch.empty(rows, block_bytes, dtype=torch.uint8, device=device_pool.device)
        self._host_staging = torch.empty(rows, block_bytes, dtype=torch.uint8, pin_memory=True)

    @property
    def batches(self) -> bool:
        return _batch_function() is not None

    def move_each(self, copies: Rows) -> None:
        device, host = self._device.view(-1), self._host.view(-1)
        with torch.cuda.stream(self._stream):
            for device_at, host_at, size in copies.tolist():
                there, here = device[device_at : device_at + size], host[host_at : host_at + size]
                if self._to_host:
                    here.copy_(there, non_blocking=True)
                else:
                    there.copy_(here, non_blocking=True)
        self._stream.synchronize()

    def move_batch(self, copies: Rows) -> None:
        function = _batch_function()
        device = copies[:, 0].astype(np.uint64) + np.uint64(self._device.data_ptr())
        host = copies[:, 1].astype(np.uint64) + np.uint64(self._host.data_ptr())
        sizes = np.ascontiguousarray(copies[:, 2].astype(np.uint64))
        to, source = (host, device) if self._to_host else (device, host)
        attributes = CopyAttributes(source_order=STREAM_ORDER)
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        with torch.cuda.device(self._device.device):
            code = function(
                to.ctypes.data,
                source.ctypes.data,
                sizes.ctypes.data,
                len(sizes),
                ctypes.addressof(attributes),
                ctypes.addressof(first),
                1,
                ctypes.addressof(failed),
                self._stream.cuda_stream,
            )
        if code:
            raise RuntimeError(f"cuMemcpyBatchAsync failed with CUDA error {code}")
        self._stream.synchronize()

    def move_staged(self, device_blocks: Rows, host_blocks: Rows) -> None:
        rows = len(self._host_staging)
        for start in range(0, len(device_blocks), rows):
            part = slice(start, start + rows)
            host_ids = torch.from_numpy(host_blocks[part])
            there, here = self._device_staging[: len(host_ids)], self._host_staging[: len(host_ids)]
            if not self._to_host:
                ops.gather_blocks(self._host, host_ids, here)
            with torch.cuda.stream(self._stream):
                device_ids = torch.from_numpy(device_blocks[part]).to(self._device.device)
                if self._to_host:
                    ops.gather_blocks(self._device, device_ids, there)
                    here.copy_(there, non_blocking=True)
                else:
                    there.copy_(here, non_blocking=True)
                    ops.scatter_blocks(there, device_ids, self._device)
            self._stream.synchronize()
            if self._to_host:
                ops.scatter_blocks(here, host_ids, self._host)
