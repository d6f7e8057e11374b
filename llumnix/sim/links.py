"""KV on its way between instances: what a read takes on links of limited bandwidth.

A read uses the outgoing link of its source and the incoming link of its target, one read at a time on each,
in the order in which reads were begun; the last blocks of a request, at most one step's worth, do not queue.
A read from a process that has died in the meantime fails when it would have ended.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from llumnix.core.errors import TransportError
from llumnix.migration.events import StartRead
from llumnix.migration.transports.base import ReadStats
from llumnix.sim.clock import Clock


@dataclass(frozen=True, slots=True)
class ReadDone:
    """A read that StartRead asked for has returned."""

    migration_id: str
    stage: int
    outcome: ReadStats | TransportError


class Reader(Protocol):
    """The instance that reads."""

    @property
    def address(self) -> str: ...

    def read_done(self, order: StartRead, outcome: ReadStats | TransportError) -> None: ...


class Links:
    """See the module. ``copy_s`` gives the time of so many blocks, ``alive`` whether the process at an
    endpoint's address lives. ``failed_reads`` is the chance that one fails for no reason."""

    def __init__(
        self,
        clock: Clock,
        seed: int,
        *,
        copy_s: Callable[[int], float],
        block_bytes: int,
        alive: Callable[[str], bool],
    ) -> None:
        self.failed_reads = 0.0
        self.kv_bytes = 0
        self._clock = clock
        self._random = random.Random(f"links {seed}")
        self._copy_s = copy_s
        self._block_bytes = block_bytes
        self._alive = alive
        self._free_at: dict[tuple[str, str], float] = {}

    def read(self, reader: Reader, order: StartRead) -> None:
        """Begin a read."""
        source, blocks = order.endpoint.address, len(order.source_blocks)
        duration_s = self._copy_s(blocks)
        begin = self._clock.now
        if not order.final:
            sides = ("out", source), ("in", reader.address)
            begin = max(begin, *(self._free_at.get(side, 0.0) for side in sides))
            for side in sides:
                self._free_at[side] = begin + duration_s
        fails = self.failed_reads > 0 and self._random.random() < self.failed_reads
        kv_bytes = blocks * self._block_bytes

        def end(_: object) -> None:
            outcome: ReadStats | TransportError = ReadStats(kv_bytes, 1, duration_s, duration_s)
            if fails or not self._alive(source):
                outcome = TransportError("cut short" if fails else "the source is gone")
            else:
                self.kv_bytes += kv_bytes
            reader.read_done(order, outcome)

        self._clock.at(begin + duration_s, end)
