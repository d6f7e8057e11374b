"""Instance-hours that a policy saves against a baseline at equal P99 prefill latency.

Two runs with the same scaling band differ in both cost and latency, so neither alone says what is saved. Each
policy is run with several bands, which trade hours for latency. For every run of a policy, the hours that the
baseline needs for the same P99 are read off the baseline's own runs: of those only the ones count that no
other beats in both, joined by straight lines in the logarithm of the latency. Where the baseline reached no
latency as good, or none as bad, nothing is said: the curve is not drawn beyond its ends. Called by
``llumnix simulate osdi24-autoscaling``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Any

BASELINE = "load"


@dataclass(frozen=True, slots=True)
class Saving:
    """One run of ``policy``; ``baseline_hours`` is what the baseline needs for the same ``prefill_p99_s``."""

    workload: str
    policy: str
    scale_low_freeness: float
    prefill_p99_s: float
    instance_hours: float
    baseline_hours: float

    @property
    def share(self) -> float:
        """Of the baseline's hours; negative: the policy needs more."""
        return 1 - self.instance_hours / self.baseline_hours


Point = tuple[float, float]  # instance-hours, P99 in seconds


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, by rising hours, so by falling latency."""
    kept: list[Point] = []
    for hours, latency_s in sorted(points):
        if not kept or latency_s < kept[-1][1]:
            kept.append((hours, latency_s))
    return kept


def hours_for(latency_s: float, points: Sequence[Point]) -> float | None:
    """Hours at which a frontier reaches a latency. None: outside of what it covers."""
    for (hours, worse), (more, better) in pairwise(points):
        if better <= latency_s <= worse:
            return hours + (more - hours) * log(worse / latency_s) / log(worse / better)
    return None


def savings(rows: Sequence[Mapping[str, Any]]) -> list[Saving]:
    """For every run of another policy whose latency the baseline's curve covers. ``rows`` are summaries with
    ``scale_low_freeness`` among them."""
    found = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        runs = [row for row in rows if row["workload"] == workload]
        curve = frontier([_point(row) for row in runs if row["policy"] == BASELINE])
        for row in runs:
            hours, latency_s = _point(row)
            needed = hours_for(latency_s, curve)
            if row["policy"] != BASELINE and needed is not None:
                band = row["scale_low_freeness"]
                found.append(Saving(workload, row["policy"], band, latency_s, hours, needed))
    return found


def _point(row: Mapping[str, Any]) -> Point:
    return row["instance_hours"], row["latency_s"]["prefill"]["p99"]
