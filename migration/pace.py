"""How long an instance's steps take of late, and how fast its peers read. Kept by the agent, read by both
sides of its migrations."""

from collections import OrderedDict, deque
from collections.abc import Sequence

STEPS_REMEMBERED = 8
TARGETS_MAX = 256
SPEED_S = 60.0


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


class CopySpeeds:
    """How fast targets lately read what was swapped out here: at full speed, unlike what a running request
    copies. Kept by the agent's outgoing migrations, for the latest TARGETS_MAX targets. A speed counts for
    SPEED_S: one slow copy must not rule out all later ones."""

    def __init__(self) -> None:
        self._bytes_s: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def note(self, target: str, kv_bytes: int, copy_s: float, now: float) -> None:
        """A target has read so many bytes."""
        if copy_s > 0:
            self._bytes_s[target] = (kv_bytes / copy_s, now)
            self._bytes_s.move_to_end(target)
            if len(self._bytes_s) > TARGETS_MAX:
                self._bytes_s.popitem(last=False)

    def copy_s(self, target: str, kv_bytes: int, now: float) -> float:
        """What it would take a target to read so many; 0.0: not known."""
        bytes_s, at = self._bytes_s.get(target, (0.0, now))
        return kv_bytes / bytes_s if bytes_s and now - at < SPEED_S else 0.0
