"""What a migration does to the steps of those that stay, from the times at which their tokens were heard.

Steps while migrating are compared with those of the same instance right before, so with the same batch: slow
changes of the machine fall out. At the source they end with the last token of the request that moves, at the
target with its first. What that last step at the target took beyond an ordinary one with the newcomer is what
the target held it for, and counts. Pure; called by migration_driver.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median


@dataclass(frozen=True, slots=True)
class Window:
    """Moments of one migration, on the listener's clock: the request had settled at its source, the move was
    ordered, its last token from the source was heard, its first from the target, and it had settled there."""

    rested: float
    ordered: float
    last: float
    first: float
    settled: float


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps of both instances during one migration: ``count`` of them took ``migrating_s`` in all and would
    have taken ``ordinary_s`` at the pace before. ``control`` is the pace of the later half of the steps
    before against the earlier: what comparing finds where nothing was done. ``held_s``: how long the target
    held its step."""

    count: int
    migrating_s: float
    ordinary_s: float
    control: float
    held_s: float

    @property
    def slowdown(self) -> float:
        """0.01: one per cent slower."""
        return self.migrating_s / self.ordinary_s - 1.0


def compare(window: Window, source: Sequence[float], target: Sequence[float]) -> Steps | None:
    """``source`` and ``target``: when tokens of a request that stays there were heard. None: too few."""
    count, migrating_s, ordinary_s, held_s = 0, 0.0, 0.0, 0.0
    halves: list[float] = []
    for joined, times, end in ((False, source, window.last), (True, target, window.first)):
        gaps = list(pairwise(times))
        before = [b - a for a, b in gaps if a >= window.rested and b <= window.ordered]
        during = [b - a for a, b in gaps if a >= window.ordered and b <= end]
        if len(before) < 4 or not during:
            return None
        pace = mean(before)
        if joined:
            after = [b - a for a, b in gaps if a >= window.first and b <= window.settled]
            if len(after) < 2:
                return None
            held_s = during[-1] - median(after)
            during[-1] = pace + held_s
        count += len(during)
        migrating_s += sum(during)
        ordinary_s += pace * len(during)
        middle = len(before) // 2
        halves.append(mean(before[middle:]) / mean(before[:middle]) - 1.0)
    return Steps(count, migrating_s, ordinary_s, mean(halves), held_s)
