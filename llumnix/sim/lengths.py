"""How long prompts and outputs are: the paper's power laws, and quantile curves of real conversations.

A distribution draws ``count`` whole lengths, each at least 1, from a generator it is given.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llumnix.core.errors import ConfigurationError

Lengths = NDArray[np.int64]


class Distribution(Protocol):
    """Lengths in tokens."""

    def draw(self, rng: np.random.Generator, count: int) -> Lengths: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always ``tokens``."""

    tokens: int

    def draw(self, rng: np.random.Generator, count: int) -> Lengths:
        return np.full(count, self.tokens, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """The generator of the Llumnix paper's artifact: Zipf over 1 … 2·mean-1, the draws scaled so that their
    own mean is ``mean``, rounded up, capped. All draws of a trace have to be made at once."""

    mean: int
    exponent: float
    cap: int = 6144

    def draw(self, rng: np.random.Generator, count: int) -> Lengths:
        ranks = np.arange(1, 2 * self.mean)
        weights = ranks**-self.exponent
        cumulative = np.cumsum(weights / weights.sum())
        places = np.searchsorted(cumulative, rng.random(count), side="right")
        drawn = ranks[np.minimum(places, len(ranks) - 1)]
        scaled = np.ceil(drawn * (self.mean / drawn.mean()))
        return np.asarray(np.minimum(scaled, self.cap), dtype=np.int64)


SHORT, MEDIUM, LONG = PowerLaw(128, 2.0), PowerLaw(256, 1.5), PowerLaw(512, 1.15)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Known quantiles joined by straight lines in the logarithm of the length, from 1 token at 0 to ``most``
    at 1. ``points`` are (share, tokens), ascending."""

    points: tuple[tuple[float, float], ...]
    most: int

    def draw(self, rng: np.random.Generator, count: int) -> Lengths:
        shares = [0.0, *(share for share, _ in self.points), 1.0]
        logs = np.log([1.0, *(tokens for _, tokens in self.points), float(self.most)])
        return np.asarray(np.ceil(np.exp(np.interp(rng.random(count), shares, logs))), dtype=np.int64)


def _percentiles(p50: int, p80: int, p95: int, p99: int, most: int) -> Quantiles:
    return Quantiles(((0.5, p50), (0.8, p80), (0.95, p95), (0.99, p99)), most)


# The percentiles that the paper gives; ``most`` is the cap of its traces.
SHAREGPT_IN = _percentiles(74, 348, 1484, 3388, 6144)
SHAREGPT_OUT = _percentiles(487, 781, 988, 1234, 6144)
BURSTGPT_IN = _percentiles(582, 1427, 2345, 3549, 6144)
BURSTGPT_OUT = _percentiles(243, 434, 669, 964, 6144)

NAMED: dict[str, tuple[Distribution, Distribution]] = {
    **{
        f"{a}-{b}": (first, second)
        for a, first in (("S", SHORT), ("M", MEDIUM), ("L", LONG))
        for b, second in (("S", SHORT), ("M", MEDIUM), ("L", LONG))
    },
    "sharegpt": (SHAREGPT_IN, SHAREGPT_OUT),
    "burstgpt": (BURSTGPT_IN, BURSTGPT_OUT),
}


def lengths(name: str) -> tuple[Distribution, Distribution]:
    """Input and output lengths by name, or fixed ones as ``IN:OUT``. Raises ConfigurationError."""
    if name in NAMED:
        return NAMED[name]
    first, colon, second = name.partition(":")
    if colon and first.isdecimal() and second.isdecimal() and int(first) >= 1 and int(second) >= 1:
        return Fixed(int(first)), Fixed(int(second))
    raise ConfigurationError(f"unknown lengths {name!r}; there are {', '.join(NAMED)}, or IN:OUT in tokens")
