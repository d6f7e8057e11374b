"""Instance-hours that a policy saves against a baseline at equal P99 prefill latency.

Two runs with the same scaling settings differ in both cost and latency, so neither alone says what is
saved. Each policy is run with several settings of each way to scale, which trade hours for latency. For every
run of a policy, the hours that the baseline needs for the same P99 on the same requests are read off the
baseline's own runs under one way to scale: of those only the ones count that no other beats in both, joined
by straight lines in the logarithm of the latency. Where the baseline reached no latency as good, or none as
bad, nothing is said: the curve is not drawn beyond its ends. Called by
``llumnix simulate osdi24-autoscaling``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from statistics import fmean
from typing import Any

BASELINE = "load"


@dataclass(frozen=True, slots=True)
class Saving:
    """One run of ``policy`` under the scaling policy ``scaling`` with its ``setting``; ``baseline_hours`` is
    what the baseline, scaled by ``baseline_scaling``, needs for the same ``prefill_p99_s``."""

    workload: str
    seed: int
    policy: str
    scaling: str
    setting: float
    baseline_scaling: str
    prefill_p99_s: float
    instance_hours: float
    baseline_hours: float

    @property
    def share(self) -> float:
        """Of the baseline's hours; negative: the policy needs more."""
        return 1 - self.instance_hours / self.baseline_hours


@dataclass(frozen=True, slots=True)
class Spread:
    """The same over ``seeds``: means, and the least and greatest share."""

    workload: str
    policy: str
    scaling: str
    setting: float
    baseline_scaling: str
    seeds: int
    prefill_p99_s: float
    instance_hours: float
    baseline_hours: float
    saved: float
    saved_least: float
    saved_most: float


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
    """For every run of another policy and every way to scale the baseline whose curve covers its latency.
    ``rows`` are summaries with ``scaling`` and ``setting`` among them."""
    found = []
    for workload, seed in dict.fromkeys((row["workload"], row["seed"]) for row in rows):
        runs = [row for row in rows if (row["workload"], row["seed"]) == (workload, seed)]
        baseline = [row for row in runs if row["policy"] == BASELINE]
        for scaling in dict.fromkeys(row["scaling"] for row in baseline):
            curve = frontier([_point(row) for row in baseline if row["scaling"] == scaling])
            for row in runs:
                hours, latency_s = _point(row)
                needed = hours_for(latency_s, curve)
                if row["policy"] != BASELINE and needed is not None:
                    own = (row["policy"], row["scaling"], row["setting"])
                    found.append(Saving(workload, seed, *own, scaling, latency_s, hours, needed))
    return found


def over_seeds(found: Sequence[Saving]) -> list[Spread]:
    """One for each set of runs that differ by seed alone."""
    groups: dict[tuple[str, str, str, float, str], list[Saving]] = {}
    for one in found:
        key = (one.workload, one.policy, one.scaling, one.setting, one.baseline_scaling)
        groups.setdefault(key, []).append(one)
    return [
        Spread(
            *key,
            len(group),
            fmean(one.prefill_p99_s for one in group),
            fmean(one.instance_hours for one in group),
            fmean(one.baseline_hours for one in group),
            fmean(one.share for one in group),
            min(one.share for one in group),
            max(one.share for one in group),
        )
        for key, group in groups.items()
    ]


def _point(row: Mapping[str, Any]) -> Point:
    return row["instance_hours"], row["latency_s"]["prefill"]["p99"]
