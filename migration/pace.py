"""How long an instance's steps take of late. Kept by the agent, read by both sides of its migrations."""

from collections import deque
from collections.abc import Sequence

STEPS_REMEMBERED = 8


class Pace:
    """The durations of the last few steps that computed something."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=STEPS_REMEMBERED)

    def note(self, durations_s: Sequence[float]) -> None:
        """These steps have been done."""
        self._steps.extend(durations_s)

    @property
    def step_s(self) -> float:
        """Their median, so that one long prefill does not count; 0.0 before any."""
        return sorted(self._steps)[len(self._steps) // 2] if self._steps else 0.0
