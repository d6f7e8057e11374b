"""Where in a pool blocks are taken: in groups that can grow in place, or wherever a free list happens to have
them.

A group is a run of free blocks that one holder uses from the front; the rest, its tail, is the holder's first
choice for growth and free all the same: when no free run is long enough, a tail is taken back, together with
the free run behind it: if they hold all that is needed, what is left over is divided equally, else the holder
keeps half. So contiguity never costs a block. Following FastSwitch (arXiv 2411.18424), with one difference:
how long a new group's tail may be is no constant, the caller makes it the holder's equal share of what is
free now. Short of space, that puts all of it into tails and in none of them too much. What else was tried,
and how much better one could do that knew the future: docs/switching.md.

``ScatteredBlocks`` is the plain free list of others, for comparison. Called by the block manager only, which
never asks for more than ``total``.
"""

from dataclasses import dataclass, field
from typing import Protocol

from llumnix.core.errors import InvariantError
from llumnix.instance.free_runs import FreeRuns, runs_of


@dataclass(slots=True, eq=False)
class Holding:
    """The blocks of one holder, in order of position, and the free tail behind the last of them."""

    blocks: list[int] = field(default_factory=list)
    tail_start: int = 0
    tail_length: int = 0


class BlockPool(Protocol):
    """The free blocks of a pool."""

    @property
    def total(self) -> int:
        """Free blocks, tails included."""
        ...

    def take(self, holding: Holding, count: int, expected: int) -> None:
        """Append ``count`` blocks to a holding that is likely to grow by ``expected`` more."""
        ...

    def give(self, blocks: list[int]) -> None:
        """Make blocks free."""
        ...

    def shed(self, holding: Holding) -> None:
        """Give up a holding's tail."""
        ...

    def runs(self) -> list[tuple[int, int]]:
        """All free runs as (start, length), by start, tails included."""
        ...

    def check(self) -> None:
        """Raise InvariantError unless it agrees with itself."""
        ...


class GroupedBlocks:
    """See the module."""

    def __init__(self, capacity: int) -> None:
        self._free = FreeRuns(capacity)
        self._tailed: dict[Holding, None] = {}
        self._tail_blocks = 0

    @property
    def total(self) -> int:
        return self._free.total + self._tail_blocks

    def take(self, holding: Holding, count: int, expected: int) -> None:
        if count < holding.tail_length:  # nearly always: it goes on where it left off
            end = holding.tail_start + count
            holding.blocks.extend(range(holding.tail_start, end))
            holding.tail_start = end
            holding.tail_length -= count
            self._tail_blocks -= count
            return
        while count > 0:
            if holding.tail_length == 0:
                self._new_group(holding, count, expected)
            used = min(count, holding.tail_length)
            holding.blocks.extend(range(holding.tail_start, holding.tail_start + used))
            self._set_tail(holding, holding.tail_start + used, holding.tail_length - used)
            count -= used

    def give(self, blocks: list[int]) -> None:
        for start, length in runs_of(blocks):
            self._free.put(start, length)

    def shed(self, holding: Holding) -> None:
        if holding.tail_length:
            self._take_back(holding, holding.tail_length)

    def runs(self) -> list[tuple[int, int]]:
        whole = FreeRuns(0)
        for start, length in self._free.runs():
            whole.put(start, length)
        for holding in self._tailed:
            whole.put(holding.tail_start, holding.tail_length)
        return whole.runs()

    def check(self) -> None:
        self._free.check()
        tails = [holding.tail_length for holding in self._tailed]
        if sum(tails) != self._tail_blocks or not all(tails):
            raise InvariantError("the tails of block groups are miscounted")

    def _new_group(self, holding: Holding, count: int, expected: int) -> None:
        """Give a holding without a tail one of at least one block, best of ``count + expected``."""
        wanted = count + expected
        behind = holding.blocks[-1] + 1 if holding.blocks else -1
        length = self._free.length_at(behind)
        if length:
            start = behind
        else:
            start, length = self._free.fitting(wanted) or self._longest(count)
        used = min(length, wanted)
        self._free.carve(start, 0, used)
        self._set_tail(holding, start, used)

    def _longest(self, count: int) -> tuple[int, int]:
        """The longest free run, after taking back the tail that makes it longest, if one does. O(holders)."""
        longest = self._free.longest()
        most = longest[1] if longest else 0
        found: tuple[Holding, int] | None = None
        for holding in self._tailed:
            tail = holding.tail_length
            behind = self._free.length_at(holding.tail_start + tail)
            spare = tail + behind - count
            kept = min(tail, spare // 2) if spare >= 0 else tail // 2
            if kept < tail and tail + behind - kept > most:
                most, found = tail + behind - kept, (holding, tail - kept)
        if found is not None:
            self._take_back(*found)
            longest = self._free.longest()
        if longest is None:
            raise InvariantError("a block was taken where none is free")
        return longest

    def _take_back(self, holding: Holding, count: int) -> None:
        left = holding.tail_length - count
        self._set_tail(holding, holding.tail_start, left)
        self._free.put(holding.tail_start + left, count)

    def _set_tail(self, holding: Holding, start: int, length: int) -> None:
        self._tail_blocks += length - holding.tail_length
        holding.tail_start, holding.tail_length = start, length
        if length:
            self._tailed[holding] = None
        else:
            self._tailed.pop(holding, None)


class ScatteredBlocks:
    """A free list: the block freed last goes out first. No holding has a tail."""

    def __init__(self, capacity: int) -> None:
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def total(self) -> int:
        return len(self._free)

    def take(self, holding: Holding, count: int, expected: int) -> None:
        if count:
            holding.blocks.extend(reversed(self._free[-count:]))
            del self._free[-count:]

    def give(self, blocks: list[int]) -> None:
        self._free.extend(blocks)

    def shed(self, holding: Holding) -> None:
        """Holdings have no tails here."""

    def runs(self) -> list[tuple[int, int]]:
        return list(runs_of(sorted(self._free)))

    def check(self) -> None:
        if len(set(self._free)) != len(self._free):
            raise InvariantError("a block is free twice")
