"""The cluster's recent history, for people: a bounded log of numbered events.

A reader asks for what came after the last number it saw; a gap tells it how many it missed. Filled by the
runtime from the global scheduler's Logged effects; read by the admin endpoints, the CLI and the metrics.
"""

from collections import deque
from itertools import islice

from llumnix.core.admin import Event

EVENTS_MAX = 10_000


class EventLog:
    """The newest ``events_max`` events, numbered from ``first`` on. The clock is the caller's. A manager that
    starts anew begins above all numbers given before, so that readers notice nothing but a jump."""

    def __init__(self, events_max: int = EVENTS_MAX, first: int = 1) -> None:
        self._events: deque[Event] = deque(maxlen=events_max)
        self._sequence = first - 1

    def append(self, at_s: float, kind: str, text: str, fields: dict[str, str | int | float | bool]) -> Event:
        """Add one; the oldest goes if the log is full."""
        self._sequence += 1
        event = Event(self._sequence, at_s, kind, text, fields)
        self._events.append(event)
        return event

    def after(self, sequence: int) -> tuple[Event, ...]:
        """Events numbered above ``sequence``, oldest first."""
        if not self._events:
            return ()
        missed = max(0, sequence - self._events[0].sequence + 1)
        return tuple(islice(self._events, missed, None))
