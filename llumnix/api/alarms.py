"""Timers of the stream table: at least one entry per open stream, looked at no later than its deadline.

A stream that gets tokens pushes its deadline on all the time; only the entry's firing looks at the new value
and sets the next one, so a token costs no timer work.
"""

from heapq import heappop, heappush
from math import ceil, inf

from llumnix.api.stream_state import Phase, Stream


class Alarms:
    """A heap of (time, order, stream). Deadlines for silence are rounded up to a grid of ``grid_s``, so that
    probes fall together and can travel together."""

    def __init__(self, grid_s: float) -> None:
        self._grid_s = grid_s
        self._heap: list[tuple[float, int, Stream]] = []
        self._count = 0

    def arm(self, stream: Stream) -> None:
        """Make sure that an entry looks at the stream by its deadline."""
        at = stream.deadline
        if stream.phase is Phase.STREAMING:
            at = max(at, ceil(at / self._grid_s) * self._grid_s)
        if at < stream.alarm:
            stream.alarm = at
            self._count += 1
            heappush(self._heap, (at, self._count, stream))

    def disarm(self, stream: Stream) -> None:
        """The stream is closed; its entry is dropped when its time comes."""
        stream.alarm = inf

    def next_at(self) -> float:
        """When the next live entry fires; inf if there is none."""
        while self._heap and self._heap[0][2].alarm != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else inf

    def due(self, now: float) -> list[Stream]:
        """Streams whose deadline has passed, each without an entry now: whoever acts on it sets the next."""
        passed = []
        while self.next_at() <= now:
            stream = heappop(self._heap)[2]
            stream.alarm = inf
            if stream.deadline > now:
                self.arm(stream)
            else:
                passed.append(stream)
        return passed
