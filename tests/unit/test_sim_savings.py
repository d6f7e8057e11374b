"""Hours saved at equal latency are read off the baseline's curve, and nothing is said beyond its ends."""

import pytest

from llumnix.sim.savings import frontier, hours_for, over_seeds, savings


def row(policy: str, hours: float, p99_s: float, scaling: str = "demand", seed: int = 0) -> dict[str, object]:
    latency = {"prefill": {"p99": p99_s}}
    return {
        "workload": "w",
        "seed": seed,
        "policy": policy,
        "instance_hours": hours,
        "latency_s": latency,
        "scaling": scaling,
        "setting": 1.0,
    }


def test_a_run_that_another_beats_in_both_does_not_count() -> None:
    assert frontier([(9.0, 4.0), (8.0, 100.0), (8.5, 100.0), (10.0, 5.0)]) == [(8.0, 100.0), (9.0, 4.0)]


def test_between_two_runs_the_latency_falls_evenly_in_its_logarithm() -> None:
    curve = [(8.0, 100.0), (10.0, 1.0)]
    assert hours_for(10.0, curve) == pytest.approx(9.0)
    assert hours_for(100.0, curve) == pytest.approx(8.0)
    assert hours_for(0.5, curve) is None and hours_for(101.0, curve) is None


def test_savings_compare_at_the_latency_of_the_other_policy() -> None:
    runs = [
        row("load", 8.0, 100.0),
        row("load", 10.0, 1.0),
        row("llumnix", 6.0, 10.0),
        row("llumnix", 9, 0.1),
    ]
    (saving,) = savings(runs)
    assert (saving.policy, saving.baseline_hours) == ("llumnix", pytest.approx(9.0))
    assert saving.share == pytest.approx(1 / 3)


def test_each_way_to_scale_the_baseline_is_a_curve_of_its_own_and_seeds_are_not_mixed() -> None:
    found = savings(
        [
            *(row("load", hours, p99_s) for hours, p99_s in ((8.0, 100.0), (10.0, 1.0))),
            *(row("load", hours, p99_s, "freeness") for hours, p99_s in ((16.0, 100.0), (20.0, 1.0))),
            *(row("load", hours, p99_s, seed=1) for hours, p99_s in ((4.0, 100.0), (8.0, 1.0))),
            row("llumnix", 6.0, 10.0),
            row("llumnix", 6.0, 10.0, seed=1),
        ]
    )
    by = [(one.seed, one.baseline_scaling) for one in found]
    assert by == [(0, "demand"), (0, "freeness"), (1, "demand")]
    demand, freeness = over_seeds(found)
    assert (demand.seeds, freeness.seeds) == (2, 1)
    assert demand.saved == pytest.approx(1 / 6) and freeness.saved == pytest.approx(2 / 3)
    assert (demand.saved_least, demand.saved_most) == (pytest.approx(0.0), pytest.approx(1 / 3))
