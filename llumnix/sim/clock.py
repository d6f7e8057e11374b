"""Virtual time: what happens next, and when.

Events at the same time happen in the order in which they were asked for, so a run is a function of its seed.
Everything in the simulator is driven from here; nothing in it reads a real clock.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from math import inf
from typing import Any

Event = tuple[float, int, Callable[[Any], None], Any]


class Clock:
    """``now`` in seconds, and the events to come: (time, order, action, argument)."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._stopped = False
        self._heap: list[Event] = []
        self._line: deque[Event] = deque()

    def at(self, when: float, action: Callable[[Any], None], argument: Any = None) -> None:
        """Call ``action(argument)`` at ``when``, or as soon as possible if that has passed."""
        self.events += 1
        heappush(self._heap, (when, self.events, action, argument))

    def in_line(self, when: float, action: Callable[[Any], None], argument: Any) -> None:
        """The same, cheaper, for events of which none is due before the one last asked for in this way."""
        self.events += 1
        self._line.append((when, self.events, action, argument))

    def stop(self) -> None:
        """Let ``run`` return after the event that is happening now."""
        self._stopped = True

    def run(self, until: float = inf, events_max: int = 1 << 62) -> bool:
        """Let at most ``events_max`` events happen that are due by ``until``, or up to ``stop``. False: none
        of them is left."""
        heap, line, self._stopped = self._heap, self._line, False
        for _ in range(events_max):
            if line and not (heap and heap[0] < line[0]):
                event, heaped = line[0], False
            elif heap:
                event, heaped = heap[0], True
            else:
                return False
            when, _, action, argument = event
            if when > until:
                self.now = until
                return False
            if heaped:
                heappop(heap)
            else:
                line.popleft()
            if when > self.now:
                self.now = when
            action(argument)
            if self._stopped:
                break
        return True
