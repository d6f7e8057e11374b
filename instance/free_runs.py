"""The free blocks of a KV pool, kept as runs, so that what is handed out lies together where it can.

Migration and swap copy runs, so fewer and longer runs mean fewer and larger copies. Which run is cut up is
the caller's to choose (block_manager.py); this keeps them found and merged. A run is held once per index: by
start, by end (for merging) and by length. Everything costs O(log runs) to find, O(runs) memory moves to keep
sorted.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from itertools import pairwise

from llumnix.core.errors import InvariantError


def runs_of(blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The (start, length) of each ascending run of consecutive ids, in the order given."""
    start, length = -1, 0
    for block in blocks:
        if length and block == start + length:
            length += 1
            continue
        if length:
            yield start, length
        start, length = block, 1
    if length:
        yield start, length


class FreeRuns:
    """See the module. ``total`` is the number of free blocks."""

    def __init__(self, capacity: int) -> None:
        self.total = 0
        self._length_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        self._by_length: list[tuple[int, int]] = []
        if capacity:
            self.put(0, capacity)

    def longest(self) -> tuple[int, int] | None:
        """The (start, length) of the longest run, the last of several; None: nothing is free."""
        if not self._by_length:
            return None
        length, start = self._by_length[-1]
        return start, length

    def fitting(self, count: int) -> tuple[int, int] | None:
        """The (start, length) of the shortest run of at least ``count`` blocks, the first of several; None:
        there is none."""
        place = bisect_left(self._by_length, (count, -1))
        if place == len(self._by_length):
            return None
        length, start = self._by_length[place]
        return start, length

    def length_at(self, start: int) -> int:
        """Length of the run that begins at ``start``; 0: none does."""
        return self._length_at.get(start, 0)

    def carve(self, start: int, offset: int, count: int) -> range:
        """Take ``count`` blocks, ``offset`` behind the beginning, out of the run at ``start``. Raises
        InvariantError if it is not that long."""
        length = self._length_at.get(start, 0)
        if count < 1 or offset + count > length:
            raise InvariantError(f"{count} blocks at {start}+{offset} taken of a free run of {length}")
        self._remove(start)
        if offset:
            self._add(start, offset)
        if length > offset + count:
            self._add(start + offset + count, length - offset - count)
        self.total -= count
        return range(start + offset, start + offset + count)

    def put(self, start: int, length: int) -> None:
        """Give back a run, merging it with its free neighbours."""
        self.total += length
        end = start + length
        before = self._start_before.get(start)
        if before is not None:
            length += self._remove(before)
            start = before
        if end in self._length_at:
            length += self._remove(end)
        self._add(start, length)

    def runs(self) -> list[tuple[int, int]]:
        """All free runs as (start, length), by start."""
        return sorted(self._length_at.items())

    def check(self) -> None:
        """Raise InvariantError unless the indexes agree and no two runs touch."""
        runs = self.runs()
        if sum(length for _, length in runs) != self.total:
            raise InvariantError("free total differs from its runs")
        if self._by_length != sorted((length, start) for start, length in runs):
            raise InvariantError("the index by length differs from the runs")
        if self._start_before != {start + length: start for start, length in runs}:
            raise InvariantError("the index by end differs from the runs")
        for (start, length), (after, _) in pairwise(runs):
            if length < 1 or start + length >= after:
                raise InvariantError(f"free runs at {start} and {after} overlap or touch")

    def _add(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_before[start + length] = start
        insort(self._by_length, (length, start))

    def _remove(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        return length
