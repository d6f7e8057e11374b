"""What a migration has been through, for errors and logs. Kept by both state machines."""

from collections import deque

EVENTS_MAX = 32


class Story:
    """The last events and the states they led to."""

    def __init__(self) -> None:
        self._events: deque[str] = deque(maxlen=EVENTS_MAX)

    def note(self, event: object, state: str, now: float) -> None:
        """``event`` has led to ``state``."""
        self._events.append(f"{now:.4f} {type(event).__name__} -> {state}")

    def __str__(self) -> str:
        return "; ".join(self._events) or "just begun"
