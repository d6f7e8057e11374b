"""Memory in huge pages, where Linux gives them.

A step reads all weights once, and KV blocks from all over the pool. With pages of 4 KiB the processor then
waits for address translation, twice over in a virtual machine; pages of 2 MiB make that cheap. Nothing here
fails for want of huge pages: ordinary ones then do. Used for packed weights (kernels.py) and for the KV pool.
"""

import ctypes
import mmap
import sys
import weakref
from functools import cache
from threading import Lock
from typing import Final

import torch
from torch import Tensor

HUGE_PAGE: Final = 2 << 20
CHUNK_BYTES: Final = 64 << 20  # pages that nobody has written yet take no memory
ALIGNMENT: Final = 64
MADV_COLLAPSE: Final = 25  # Linux 6.1; mmap does not know it
_FAILED: Final = ctypes.c_void_p(-1).value


class Arena:
    """Memory for tensors that live as long as a model. It is given back when the last tensor of a chunk is
    gone and the arena has moved on to another chunk."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def hold(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of ``tensor``."""
        size = tensor.numel() * tensor.element_size()
        with self._lock:
            if self._used + size > len(self._chunk):
                self._chunk, self._used = _huge(max(size, CHUNK_BYTES)), 0
            piece = self._chunk[self._used : self._used + size]
            self._used += -(-size // ALIGNMENT) * ALIGNMENT
        held = piece.view(tensor.dtype).view(tensor.shape)
        return held.copy_(tensor)


def map_shared(fd: int, size: int) -> Tensor:
    """The first ``size`` bytes of a file as uint8, mapped for reading and writing where huge pages are
    possible. Raises OSError. Linux only."""
    libc = _libc()
    room = size + HUGE_PAGE
    reserved = libc.mmap(None, room, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if reserved == _FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    start = -(-reserved // HUGE_PAGE) * HUGE_PAGE
    map_fixed = 0x10
    mapped = libc.mmap(start, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | map_fixed, fd, 0)
    if mapped == _FAILED:
        error = OSError(ctypes.get_errno(), "mmap")
        libc.munmap(reserved, room)
        raise error
    memory = (ctypes.c_uint8 * size).from_address(start)
    weakref.finalize(memory, libc.munmap, reserved, room)
    return torch.frombuffer(memory, dtype=torch.uint8)


def fill_with_zeros(memory: Tensor) -> None:
    """Zero bytes that ``map_shared`` gave, which nobody has used yet, so that every page is there; as huge
    pages if the kernel can."""
    whole = len(memory) // HUGE_PAGE * HUGE_PAGE
    memory[:whole:HUGE_PAGE] = 0  # a huge page is made of what is there of it
    if whole:
        _libc().madvise(memory.data_ptr(), whole, MADV_COLLAPSE)
    memory.zero_()


def _huge(size: int) -> Tensor:
    memory = torch.empty(size + HUGE_PAGE, dtype=torch.uint8)
    if sys.platform != "linux":
        return memory[:size]
    offset = -memory.data_ptr() % HUGE_PAGE
    _libc().madvise(memory.data_ptr() + offset, size // HUGE_PAGE * HUGE_PAGE, mmap.MADV_HUGEPAGE)
    return memory[offset : offset + size]


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.argtypes = [pointer, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mmap.restype = pointer
    libc.munmap.argtypes = [pointer, size]
    libc.madvise.argtypes = [pointer, size, ctypes.c_int]
    return libc
