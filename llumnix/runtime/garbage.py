"""Garbage collection when the loop chooses, not in the middle of a placement.

Python looks for cycles whenever enough objects have been made, wherever that is; with a thousand instances'
reports in memory that holds up one placement in a hundred by several times its own cost. What is left over
from messages is freed by reference counts at once, so a collection finds next to nothing, and one between
messages every half minute will do. Used by the manager's process and by its benchmark.
"""

import gc

SWEEP_S = 30.0


class Garbage:
    """Takes collection over from the interpreter until `close`. ``now`` is any clock's time in seconds."""

    def __init__(self, now: float) -> None:
        self._due_at = now + SWEEP_S
        gc.collect()
        gc.freeze()
        gc.disable()

    def sweep(self, now: float) -> bool:
        """Collect, if it is time again."""
        if now < self._due_at:
            return False
        self._due_at = now + SWEEP_S
        gc.collect()
        return True

    def close(self) -> None:
        """Give collection back."""
        gc.unfreeze()
        gc.enable()
