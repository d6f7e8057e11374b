"""How single steps scatter around what the cost model says.

A spread is what steps were measured to take over what they were predicted to, as quantiles at SPREAD_SHARES
joined by straight lines; its mean is 1, so it does not move the model's. Which place on that curve a step
gets is a pure function of (seed, instance, number of the step): the same whoever asks, in whatever order, one
by one or for a stretch. An empty spread is none: every step takes what the model says.
"""

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise

SPREAD_SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 1.0)
SPREAD_RULE = (
    f"empty or {len(SPREAD_SHARES)} numbers above 0, none smaller than the one before, whose mean is 1: the "
    f"quantiles at {', '.join(f'{share:g}' for share in SPREAD_SHARES)}"
)
MEAN_OFF_MAX = 1e-3
Spread = tuple[float, ...]
_WORD = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_UNIT = 2.0**-53


def spread_mean(points: Sequence[float]) -> float:
    """The mean of a spread."""
    parts = zip(pairwise(SPREAD_SHARES), pairwise(points), strict=True)
    return sum((after - before) * (low + high) / 2 for (before, after), (low, high) in parts)


def is_spread(points: Spread) -> bool:
    """Whether it keeps SPREAD_RULE."""
    if not points:
        return True
    if not all(isinstance(point, int | float) and not isinstance(point, bool) for point in points):
        return False
    if len(points) != len(SPREAD_SHARES) or points[0] <= 0:
        return False
    ascending = all(low <= high for low, high in pairwise(points))
    return ascending and abs(spread_mean(points) - 1) <= MEAN_OFF_MAX


def at_share(points: Spread, share: float) -> float:
    """The quantile of a spread at a share in [0, 1)."""
    place = bisect_right(SPREAD_SHARES, share) - 1
    low, high = SPREAD_SHARES[place], SPREAD_SHARES[place + 1]
    return points[place] + (points[place + 1] - points[place]) * ((share - low) / (high - low))


class Scatter:
    """Draws the steps of the instance of that name."""

    def __init__(self, decode: Spread, prefill: Spread, seed: int, name: str) -> None:
        self._decode, self._prefill = decode, prefill
        digest = blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        self._key = int.from_bytes(digest, "big")

    def factor(self, step: int, *, prefills: bool) -> float:
        """What the ``step``-th step takes over what the model says."""
        points = self._prefill if prefills else self._decode
        return at_share(points, self._share(step)) if points else 1.0

    def decodes(self, first: int, count: int) -> list[float]:
        """Those of ``count`` steps that only decode; none where these do not scatter."""
        points, share = self._decode, self._share
        return [at_share(points, share(step)) for step in range(first, first + count)] if points else []

    def _share(self, step: int) -> float:
        """SplitMix64's ``step``-th number (Steele, Lea, Flood, OOPSLA 2014) in [0, 1)."""
        word = (self._key + (step + 1) * _GOLDEN) & _WORD
        word = ((word ^ (word >> 30)) * _FIRST) & _WORD
        word = ((word ^ (word >> 27)) * _SECOND) & _WORD
        return ((word ^ (word >> 31)) >> 11) * _UNIT
