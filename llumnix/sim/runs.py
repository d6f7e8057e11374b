"""Several simulations, one after the other or in several processes, and what is kept of each."""

import gc
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llumnix.sim.presets import Case
from llumnix.sim.simulation import Settings, Simulation
from llumnix.sim.summary import columns_of, latencies, summarize, timeline_of

QUANTILES = 201
COLLECT_AFTER = 200_000


@dataclass(frozen=True, slots=True)
class Result:
    """``cdfs``: QUANTILES evenly spaced quantiles of each latency, in seconds. ``timeline`` as in
    summary.py."""

    summary: dict[str, Any]
    config: dict[str, Any]
    cost_model: dict[str, Any]
    cdfs: dict[str, list[float]]
    timeline: dict[str, Any]


def run_case(case: Case, progress: Callable[[int], None] | None = None) -> Result:
    """Simulate one case. ``progress`` hears how many more requests are over."""
    simulation = Simulation(Settings(case.config, case.cost, case.workload, case.seed))
    seen = 0

    def step(done: int) -> None:
        nonlocal seen
        if progress is not None:
            progress(done - seen)
        seen = done

    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER)  # next to nothing here forms cycles, and there is much to look through
    try:
        simulation.run(step)
    finally:
        gc.set_threshold(*before)
    columns = columns_of(simulation)
    config = asdict(case.config)
    return Result(
        summary={"policy": case.policy, **summarize(simulation), "seed": case.seed},
        config={name: config[name] for name in ("engine", "migration", "scheduler", "cluster")},
        cost_model=asdict(case.cost),
        cdfs={name: _cdf(values) for name, values in latencies(columns).items()} if columns else {},
        timeline=timeline_of(simulation),
    )


def run_cases(cases: Sequence[Case], jobs: int, progress: Callable[[int], None]) -> list[Result]:
    """Simulate all cases, ``jobs`` at a time; results in their order."""
    if jobs == 1 or len(cases) == 1:
        return [run_case(case, progress) for case in cases]
    with ProcessPoolExecutor(min(jobs, len(cases))) as pool:
        futures: list[Future[Result]] = [pool.submit(run_case, case) for case in cases]
        requests = {future: case.workload.requests for future, case in zip(futures, cases, strict=True)}
        pending: set[Future[Result]] = set(futures)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            progress(sum(requests[future] for future in done))
        return [future.result() for future in futures]


def over_seeds(results: Sequence[Result], seeds: int) -> list[dict[str, Any]]:
    """Summaries of the same cases run with several seeds, in order of seed and then of case, as one summary
    a case: every number, P99s included, is the mean over the seeds."""
    cases = len(results) // seeds
    rows = [result.summary for result in results]
    return [
        {**_mean(rows[place::cases]), "seed": [row["seed"] for row in rows[place::cases]]}
        for place in range(cases)
    ]


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: _mean(_named(values, name)) for name in names}
    if isinstance(first, int | float):
        return float(f"{sum(values) / len(values):.6g}")
    return first


def _named(values: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """What is counted is 0 where nobody counted it; what else a run has not, as requests of high priority, is
    left to those that have."""
    found = [value[name] for value in values if name in value]
    absent = len(values) - len(found)
    return found + [0] * absent if isinstance(found[0], int | float) else found


def _cdf(values: NDArray[np.float64]) -> list[float]:
    if not len(values):
        return []
    return [float(f"{value:.6g}") for value in np.quantile(values, np.linspace(0, 1, QUANTILES))]
