"""Virtual time: what happens next, and when.

Events at the same time happen in the order in which they were asked for, so a run is a function of its seed.
Everything in the simulator is driven from here; nothing in it reads a real clock.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from math import inf
from typing import Any


class Clock:
    """``now`` in seconds, and the events to come: (time, order, action, argument)."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._stopped = False
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []

    def at(self, when: float, action: Callable[[Any], None], argument: Any = None) -> None:
        """Call ``action(argument)`` at ``when``, or as soon as possible if that has passed."""
        self.events += 1
        heappush(self._heap, (when, self.events, action, argument))

    def stop(self) -> None:
        """Let ``run`` return after the event that is happening now."""
        self._stopped = True

    def run(self, until: float = inf, events_max: int = 1 << 62) -> bool:
        """Let at most ``events_max`` events happen that are due by ``until``, or up to ``stop``. False: none
        of them is left."""
        heap, self._stopped = self._heap, False
        for _ in range(events_max):
            if not heap:
                return False
            if heap[0][0] > until:
                self.now = until
                return False
            when, _, action, argument = heappop(heap)
            if when > self.now:
                self.now = when
            action(argument)
            if self._stopped:
                break
        return True
