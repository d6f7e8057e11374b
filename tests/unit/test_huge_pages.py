"""Memory meant for huge pages is ordinary memory to whoever uses it, with or without them."""

import gc
import mmap
import os
import sys

import pytest
import torch

from llumnix.kernels.cpu.huge_pages import CHUNK_BYTES, HUGE_PAGE, Arena, fill_with_zeros, map_shared


def test_what_an_arena_holds_stays_apart() -> None:
    arena = Arena()
    given = [torch.randn(count, 3) for count in (1, 50, 7, CHUNK_BYTES // 24, CHUNK_BYTES // 12 + 5, 2)]
    held = [arena.hold(tensor.T) for tensor in given]
    del arena
    gc.collect()
    for tensor, copy in zip(given, held, strict=True):
        assert copy.is_contiguous() and copy.data_ptr() % 64 == 0
        assert torch.equal(copy, tensor.T)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a memfd")
@pytest.mark.parametrize("size", [1, 5000, HUGE_PAGE, 2 * HUGE_PAGE + 4097])
def test_a_shared_mapping_is_seen_by_others_and_ends_with_its_tensors(size: int) -> None:
    fd = os.memfd_create("unit")
    try:
        os.ftruncate(fd, size)
        memory = map_shared(fd, size)
        fill_with_zeros(memory)
        assert len(memory) == size and not memory.any()
        memory[size // 2] = 9
        with mmap.mmap(fd, size) as other:
            assert other[size // 2] == 9
        inode = str(os.fstat(fd).st_ino)
        view, memory = memory[size // 2 :], torch.empty(0)
        gc.collect()
        assert view[0] == 9 and mapped(inode)
        del view
        gc.collect()
        assert not mapped(inode)
    finally:
        os.close(fd)


def test_a_file_that_cannot_be_mapped_is_an_error() -> None:
    with pytest.raises(OSError):
        map_shared(-1, 4096)


def mapped(inode: str) -> bool:
    """Whether a memfd with this inode is mapped in this process."""
    with open("/proc/self/maps") as maps:
        return any("memfd:unit" in line and f" {inode} " in line for line in maps)
