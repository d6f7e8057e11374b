"""Priorities out of nowhere, for measuring what switching costs: every request's rank is drawn anew every so
many steps, as FastSwitch does in its evaluation (arXiv 2411.18424) for want of a public trace of priorities.

Random: each draw is independent. Markov: a request keeps its rank from one draw to the next with probability
MARKOV_STAY, so that who has been served tends to be served on. A rank is a function of (seed, request, draw)
alone, so that two engines, or an engine and its simulation, see the same. Called by ranking.py.
"""

from zlib import crc32

MARKOV_STAY = 0.75
_MASK = (1 << 64) - 1


class PriorityTrace:
    """See the module."""

    def __init__(self, seed: int, *, markov: bool) -> None:
        self._seed = seed
        self._stay = MARKOV_STAY if markov else 0.0

    def rank(self, request_id: str, draw: int) -> float:
        """Within 0 and 1 at the given draw (0, 1, …); lower goes first."""
        key = crc32(request_id.encode())
        while draw > 0 and self._uniform(key, draw, 1) < self._stay:
            draw -= 1
        return self._uniform(key, draw, 0)

    def _uniform(self, key: int, draw: int, use: int) -> float:
        mixed = (self._seed * 0x9E3779B97F4A7C15 + key * 0xD1B54A32D192ED03 + 2 * draw + use + 1) & _MASK
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & _MASK
        return (mixed ^ (mixed >> 31)) / (1 << 64)
