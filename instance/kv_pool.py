"""The KV pool: one tensor per instance, block first, in memory that a peer on the same host can map. And its
like in host memory, for KV that is swapped out.

On Linux a pool in host memory lives in a memfd. A peer that knows the process id and descriptor opens
``/proc/<pid>/fd/<fd>`` and reads blocks without any staging; the memory has no name in any file system, so
nothing stays behind however the process ends. On a GPU, or where there is no memfd, it is plain memory and
``fd`` is -1. A host pool beside a GPU is pinned, so that copies run at full speed and in the background.

Every page is written once at the start: a step or a migration never pays for a page fault, and too large a
pool fails here rather than under load. (Not so a host pool whose size nobody asked for: there copy threads
pay, and it takes what it comes to use.) A memfd's pages are huge where the kernel can make them so: attention
reads blocks from all over the pool. Made by executors; read by transports.
"""

import os
import sys
from dataclasses import replace
from typing import Final

import torch

from llumnix.core.config import EngineConfig, SwapConfig
from llumnix.core.errors import ConfigurationError, InvariantError
from llumnix.core.messages.control import KvLayout
from llumnix.instance.host_memory import available_bytes
from llumnix.kernels.cpu.huge_pages import fill_with_zeros, map_shared

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAME_BYTES_MAX = 200  # Linux takes 249, prefix included
GIB = 1 << 30
SIZED_BY: Final = "kv_gib, kv_blocks, host_gib or staging_gib"
PINNED_UNASKED_BYTES: Final = 8 * GIB
"""Most host memory pinned for a GPU without being asked: that takes seconds, and all of it at once."""
PROBED_BLOCKS: Final = 512
"""Blocks at the beginning of a host pool that are touched in any case: its copies are measured there."""


def memfd_name(pool_name: str) -> str:
    """The name under which a pool's memfd shows in ``/proc/<pid>/fd``."""
    return f"llumnix-{pool_name}"


class KvPool:
    """Memory for ``layout``. ``tensor`` is ``[blocks, layers, 2, kv_heads, block_size, head_dim]``, keys at 0
    and values at 1; ``fd`` is the memfd or -1; ``pool_name`` tells a peer that it opened the right file."""

    def __init__(
        self,
        layout: KvLayout,
        pool_name: str,
        device: torch.device,
        *,
        pinned: bool = False,
        touched: bool = True,
    ) -> None:
        """Not ``touched``: what is never used takes no memory, where the kernel can do that."""
        if not pool_name or len(pool_name.encode()) > NAME_BYTES_MAX:
            raise ConfigurationError(f"a pool's name has 1 to {NAME_BYTES_MAX} bytes, got {pool_name!r}")
        if layout.blocks < 1:
            raise ConfigurationError("a KV pool needs at least one block")
        self.layout = layout
        self.pool_name = pool_name
        self.fd = -1
        self._pinned_at = 0
        size_bytes = layout.blocks * layout.block_bytes
        if device.type == "cpu" and sys.platform == "linux":
            flat = self._map_memfd(size_bytes)
            fill_with_zeros(flat if touched else flat[: PROBED_BLOCKS * layout.block_bytes])
        else:
            flat = torch.empty(size_bytes, dtype=torch.uint8, device=device).zero_()
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)  # copies come on streams of their own
        if pinned:
            _cuda("cudaHostRegister", flat.data_ptr(), size_bytes, 0)
            self._pinned_at = flat.data_ptr()
        self._bytes: torch.Tensor | None = flat.view(layout.blocks, layout.block_bytes)
        self._tensor: torch.Tensor | None = flat.view(DTYPES[layout.dtype]).view(
            layout.blocks, layout.layers, 2, layout.kv_heads, layout.block_size, layout.head_dim
        )

    @property
    def tensor(self) -> torch.Tensor:
        """The pool itself."""
        if self._tensor is None:
            raise InvariantError(f"KV pool {self.pool_name} was used after it was closed")
        return self._tensor

    def bytes_view(self) -> torch.Tensor:
        """The same memory as uint8 ``[blocks, block_bytes]``: row i is block i."""
        if self._bytes is None:
            raise InvariantError(f"KV pool {self.pool_name} was used after it was closed")
        return self._bytes

    def close(self) -> None:
        """Give the memory up. It is returned once the last tensor over it, here or in a peer, is gone."""
        if self._pinned_at:
            _cuda("cudaHostUnregister", self._pinned_at)
            self._pinned_at = 0
        self._tensor = self._bytes = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _map_memfd(self, size_bytes: int) -> torch.Tensor:
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size_bytes > memory_bytes:  # the kernel would promise it now and kill someone later
            raise ConfigurationError(
                f"a KV pool of {size_bytes / GIB:.2f} GiB ({SIZED_BY}) is more than the machine's "
                f"memory of {memory_bytes / GIB:.2f} GiB"
            )
        self.fd = os.memfd_create(memfd_name(self.pool_name))
        try:
            os.ftruncate(self.fd, size_bytes)
            return map_shared(self.fd, size_bytes)
        except OSError as error:
            os.close(self.fd)
            self.fd = -1
            raise ConfigurationError(
                f"no shared memory for {size_bytes / GIB:.2f} GiB of KV ({SIZED_BY}): {error}"
            ) from error


def _cuda(name: str, *arguments: int) -> None:
    """Call a function of the CUDA runtime."""
    code = getattr(torch.cuda.cudart(), name)(*arguments)  # type: ignore[no-untyped-call]
    if int(code):
        raise ConfigurationError(f"host memory for swapping (host_gib): {name} failed with CUDA error {code}")


def host_pool(config: SwapConfig, device_pool: KvPool) -> KvPool | None:
    """Memory for the blocks of ``device_pool`` that are swapped out; None: there is to be none. A size that
    was asked for is taken now; of one that follows from what is free (``host_share``), what is needed."""
    layout, pinned = device_pool.layout, device_pool.bytes_view().is_cuda
    blocks = config.host_blocks or int(config.host_gib * GIB) // layout.block_bytes
    if config.sized and blocks < 1:
        raise ConfigurationError(
            f"host_gib {config.host_gib}, not enough for one KV block of {layout.block_bytes} bytes"
        )
    if not config.sized:
        free = int(config.host_share * available_bytes())
        blocks = min(layout.blocks, min(free, PINNED_UNASKED_BYTES if pinned else free) // layout.block_bytes)
        if blocks < 1:
            return None
    name, layout = f"{device_pool.pool_name}-host", replace(layout, blocks=blocks)
    return KvPool(layout, name, torch.device("cpu"), pinned=pinned, touched=config.sized or pinned)


def pool_blocks(config: EngineConfig, block_bytes: int, device: torch.device) -> int:
    """How many blocks a pool gets: ``kv_blocks`` if set, else what fits ``kv_gib`` on a CPU or, on a GPU, the
    part of ``gpu_memory_share`` that is still free (so load the weights first)."""
    if config.kv_blocks:
        return config.kv_blocks
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        budget_bytes = int(total_bytes * config.gpu_memory_share) - (total_bytes - free_bytes)
        source = f"gpu_memory_share {config.gpu_memory_share} leaves {max(0, budget_bytes) / GIB:.2f} GiB"
    else:
        budget_bytes = int(config.kv_gib * GIB)
        source = f"kv_gib {config.kv_gib}"
    blocks = budget_bytes // block_bytes
    if blocks < 1:
        raise ConfigurationError(f"{source}, not enough for one KV block of {block_bytes} bytes")
    return blocks
