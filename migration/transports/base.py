"""The contract of every transport.

The target reads blocks of the source's pool into blocks of its own. A reader runs on a copy thread, never
on the engine's; it writes only to the destination blocks it was given, which stay reserved until the read
has returned. A source whose request ended mid-read simply frees its blocks: the bytes read are then
meaningless, and the protocol throws them away (AbortMigration, or no commit).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llumnix.core.messages.control import KvEndpoint


@dataclass(frozen=True, slots=True)
class ReadStats:
    """What one read cost: bytes moved, separate copies or messages it took, seconds of its own clock."""

    kv_bytes: int
    copies: int
    duration_s: float


class BlockReader(Protocol):
    """Reads from one source instance. Closed when the source is fenced or no migration has used it for a
    while."""

    def read(self, source_blocks: Sequence[int], target_blocks: Sequence[int], timeout_s: float) -> ReadStats:
        """Copy ``source_blocks[i]`` to ``target_blocks[i]`` for every i; both lists are equally long.
        Consecutive ids on both sides travel as one copy. Raises TransportError; what was written by then
        is unspecified."""
        ...

    def close(self) -> None: ...


class ReaderFactory(Protocol):
    """Opens readers: picks the fastest transport that reaches the endpoint, or the one forced by
    configuration. Raises TransportError naming the endpoint and every transport tried with the reason it
    failed."""

    def open(self, endpoint: KvEndpoint) -> BlockReader: ...
