"""The contract of every transport.

The target reads blocks of the source's pool into blocks of its own. A reader runs on copy threads, never
on the engine's; it writes only to the destination blocks it was given, which stay reserved until the read
has returned. A source whose request ended mid-read simply frees its blocks: the bytes read are then
meaningless, and the protocol throws them away (AbortMigration, or no commit).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from llumnix.core.messages.control import KvEndpoint, KvLayout


@dataclass(frozen=True, slots=True)
class ReadStats:
    """What one read cost: bytes moved, separate copies or messages it took, seconds from its begin to its
    end, and how many of these it copied rather than rested."""

    kv_bytes: int
    copies: int
    duration_s: float
    copying_s: float


class BlockPool(Protocol):
    """A pool as transports see it: uint8 memory ``[blocks, block_bytes]``; ``fd`` is its memfd or -1.
    KvPool in instance/kv_pool.py is one."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def pool_name(self) -> str: ...

    @property
    def fd(self) -> int: ...

    def bytes_view(self) -> torch.Tensor: ...


class BlockReader(Protocol):
    """Reads from one source instance, for any number of threads at a time. Closed when the source is
    fenced or no migration has used it for a while; reads that come later raise TransportError."""

    def read(
        self,
        source_blocks: Sequence[int],
        target_blocks: Sequence[int],
        timeout_s: float,
        *,
        urgent: bool = False,
        rests: bool = True,
    ) -> ReadStats:
        """Copy ``source_blocks[i]`` to ``target_blocks[i]`` for every i; both lists are equally long.
        Consecutive ids on both sides travel as one copy. ``urgent``: a step waits for this, so it waits for
        no cap. ``rests``: it may leave the processor to the engines now and then. Raises TransportError,
        among others when the source says nothing for ``timeout_s``; what was written by then is
        unspecified."""
        ...

    def close(self) -> None: ...


class ReaderFactory(Protocol):
    """Opens readers: picks the fastest transport that reaches the endpoint, or the one forced by
    configuration. Raises TransportError naming the endpoint and every transport tried with the reason it
    failed."""

    def open(self, endpoint: KvEndpoint) -> BlockReader: ...


def host_identity() -> str:
    """Names this machine as booted now and this process-id namespace: where two processes have the same,
    each can find the other under /proc by its process id."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no procfs: nothing can be found there, so no other process is on the same host
        return f"{os.uname().nodename}/{os.getpid()}"
