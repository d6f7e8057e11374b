"""``llumnix profile``: a cost model of a real engine, for ``llumnix simulate --cost-model FILE``.

Two parts, both with as many instances at once as the cluster will have: steps of the engine, to which the
step formula of sim/cost.py is fitted (profile_grid, profile_processes, profile_fit), and what serving adds to
them (profile_serving). The fit is checked on steps that it was not given. Needs a machine with nothing else
to do.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llumnix.bench.machine import describe_machine
from llumnix.bench.profile_arrivals import ratios, with_arrivals
from llumnix.bench.profile_fit import fit_copy_ms, fit_steps, relative_errors
from llumnix.bench.profile_grid import HELD_OUT, grid, held_out
from llumnix.bench.profile_processes import Measured, Timed, measure_engines
from llumnix.bench.profile_serving import (
    Served,
    added,
    measure_serving,
    rounds,
    with_serving,
)
from llumnix.core.config import Config
from llumnix.core.errors import ConfigurationError, LlumnixError
from llumnix.sim.cost import STEP_TERMS, CostModel, to_json

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Profile:
    """A fitted model and what it was made of, as JSON values."""

    cost: CostModel
    report: dict[str, Any]


def parts() -> int:
    """How often a profile tells its progress."""
    return len(grid()) + HELD_OUT + rounds()


def profile(config: Config, seed: int, progress: Progress) -> Profile:
    """Measure and fit. Raises ConfigurationError if the engine cannot start or is too small to tell."""
    if config.engine.kind != "torch":
        raise ConfigurationError(f"only torch engines can be profiled, not {config.engine.kind}")
    machine = describe_machine()
    measured = measure_engines(config, grid(), held_out(seed), progress)
    fitted, checked = (_calm(timed) for timed in (measured.fitted, measured.held_out))
    engine = _fit(config, measured, fitted)
    served = measure_serving(config, engine, seed, progress)
    extra = added(served.paces)
    cost = with_arrivals(with_serving(engine, extra), served.crowds)
    report = {
        "benchmark": "profile",
        "seed": seed,
        "machine": machine,
        "config": {name: asdict(getattr(config, name)) for name in ("engine", "cluster")},
        "cost_model": asdict(cost),
        "engine_alone": {name: getattr(engine, name) for name in STEP_TERMS},
        "errors": {
            "fitted": _errors(engine, fitted),
            "held_out": _errors(engine, checked),
        },
        "disturbed": {
            "steps": sum(p.disturbed for t in (*measured.fitted, *measured.held_out) for p in t.points),
            "kinds_left_out": len(measured.fitted) + len(measured.held_out) - len(fitted) - len(checked),
        },
        "serving": {**asdict(extra), "paces": [asdict(pace) for pace in served.paces]},
        "arrivals": _arrivals(cost, served),
        "copies": [{"tokens": tokens, "ms": round(seconds * 1e3, 4)} for tokens, seconds in measured.copies],
        "points": [_row(engine, timed, "fitted") for timed in measured.fitted]
        + [_row(engine, timed, "held out") for timed in measured.held_out],
    }
    return Profile(cost, report)


def write_model(path: Path, cost: CostModel) -> None:
    """The file that ``llumnix simulate --cost-model`` takes."""
    path.write_text(to_json(cost), encoding="utf-8")


def _calm(timed: tuple[Timed, ...]) -> tuple[Timed, ...]:
    """Those that others on the machine left in peace."""
    calm = tuple(one for one in timed if one.calm)
    if 2 * len(calm) < len(timed):
        raise LlumnixError(
            "the machine is too busy to profile: processes other than ours want its processors"
        )
    return calm


def _fit(config: Config, measured: Measured, fitted: tuple[Timed, ...]) -> CostModel:
    layout = measured.layout
    terms: dict[str, Any] = fit_steps(*_split(fitted))
    model = Path(config.engine.model).name
    instances = config.cluster.instances
    return CostModel(
        name=f"{model}, {instances} instances on one host" if instances > 1 else model,
        source=f"llumnix profile: {model} in {layout.dtype}, {instances} engines at once, least squares over "
        f"{len(fitted)} kinds of steps and what serving added to them",
        arrival_ms=0.0,
        answer_ms=0.0,
        end_ms=0.0,
        decode_spread=(),
        prefill_spread=(),
        copy_ms=float(f"{fit_copy_ms(measured.copies):.5g}"),
        serving_ms=0.0,
        capacity_tokens=layout.blocks * layout.block_size,
        max_model_len=measured.max_model_len,
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        **{name: float(f"{value:.5g}") for name, value in terms.items()},
    )


def _split(timed: tuple[Timed, ...]) -> tuple[list[Any], list[float]]:
    return [one.points[0].features for one in timed], [one.median_s for one in timed]


def _errors(cost: CostModel, timed: tuple[Timed, ...]) -> dict[str, float]:
    """Of the formula against median steps, as shares of these."""
    if not timed:
        return {"steps": 0}
    errors = np.abs(relative_errors({name: getattr(cost, name) for name in STEP_TERMS}, *_split(timed)))
    return {
        "steps": len(timed),
        "mean": round(float(errors.mean()), 4),
        "p90": round(float(np.percentile(errors, 90)), 4),
        "worst": round(float(errors.max()), 4),
    }


def _arrivals(cost: CostModel, served: Served) -> dict[str, Any]:
    """The steps that hold-ups and spreads were taken from: how many, and what they took of what the model
    says of them, on average, which is not in the spreads."""
    kinds = {}
    for name, prefills in (("decode", False), ("prefill", True)):
        steps = [step for crowd in served.crowds for step in crowd if step.prefills == prefills]
        over = ratios(cost, steps)
        kinds[name] = {
            "steps": len(steps),
            "mean": round(float(np.mean(over)), 4) if over else None,
            "deviation": round(float(np.std(over)), 4) if over else None,
        }
    return {
        **kinds,
        "not_told_apart": served.lost,
        "steps": [
            [*step.features, *step.moments, int(step.alone), round(step.seconds * 1e3, 2)]
            for crowd in served.crowds
            for step in crowd
        ],
    }


def _row(cost: CostModel, timed: Timed, use: str) -> dict[str, Any]:
    features = timed.points[0].features
    return {
        "use": use,
        **features._asdict(),
        "median_ms": round(timed.median_s * 1e3, 3),
        "mean_ms": round(timed.mean_s * 1e3, 3),
        "formula_ms": round(cost.step_s(*features) * 1e3, 3),
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """All that was measured."""
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
