"""Fits the step formula of sim/cost.py to measured steps.

Least squares of the relative error: each step is divided by the time it took, so that short steps count as
much as long ones. No coefficient may be negative. All but one term of the formula are linear in its
coefficients; for the maximum of reading weights and computing, every place among the measured prefills where
one could overtake the other is tried, and the best fit kept. Pure; used by profile.py.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from llumnix.core.errors import ConfigurationError
from llumnix.sim.cost import STEP_TERMS, StepFeatures

Array = NDArray[np.float64]
POINTS_MIN = 2 * len(STEP_TERMS)


def fit_steps(features: Sequence[StepFeatures], seconds: Sequence[float]) -> dict[str, float]:
    """The formula's coefficients, in ms, by name. Raises ConfigurationError if there are too few points."""
    if len(features) < POINTS_MIN:
        raise ConfigurationError(
            f"a cost model needs {POINTS_MIN} kinds of steps, only {len(features)} fit the engine: give it "
            "more KV (kv_gib, kv_blocks), batch_max and step_tokens_max"
        )
    rows = np.array(features, dtype=np.float64)
    times_ms = np.array(seconds) * 1e3
    best: tuple[float, dict[str, float]] | None = None
    for turn in (0.0, *sorted({float(prefill) for prefill in rows[:, 2] if prefill > 0})):
        coefficients, error = _fit_at(turn, rows, times_ms)
        if best is None or error < best[0]:
            best = error, coefficients
    assert best is not None
    return best[1]


def relative_errors(
    coefficients: dict[str, float], features: Sequence[StepFeatures], seconds: Sequence[float]
) -> Array:
    """How far the formula is off each step: predicted / measured - 1."""
    rows = np.array(features, dtype=np.float64)
    compute = np.maximum(coefficients["weights_ms"], coefficients["token_ms"] * rows[:, 2])
    linear = rows[:, [0, 1, 3]] @ [
        coefficients[name] for name in ("request_ms", "context_ms", "attention_ms")
    ]
    linear += coefficients["mixed_ms"] * _mixed(rows)
    return np.asarray((coefficients["fixed_ms"] + compute + linear) / (np.array(seconds) * 1e3) - 1)


def fit_copy_ms(copies: Sequence[tuple[int, float]]) -> float:
    """Milliseconds per token of KV copied: least squares of the relative error through the origin."""
    tokens, times_ms = np.array(copies, dtype=np.float64).T * [[1.0], [1e3]]
    scaled = tokens / times_ms
    return float(scaled.sum() / (scaled @ scaled))


def non_negative(matrix: Array, wanted: Array) -> Array:
    """The x >= 0 that minimises |matrix x - wanted|: where few columns are, by trying which of them take
    part. ``matrix``: [rows, columns]."""
    columns = matrix.shape[1]
    best, least = np.zeros(columns), float(wanted @ wanted)
    for count in range(1, columns + 1):
        for chosen in combinations(range(columns), count):
            part = matrix[:, chosen]
            solution = np.linalg.lstsq(part, wanted, rcond=None)[0]
            rest = part @ solution - wanted
            error = float(rest @ rest)
            if (solution >= 0).all() and error < least:
                least = error
                best = np.zeros(columns)
                best[list(chosen)] = solution
    return best


def _fit_at(turn: float, rows: Array, times_ms: Array) -> tuple[dict[str, float], float]:
    """The best coefficients if computing overtakes reading weights at ``turn`` prefilled tokens, so that
    weights_ms = turn * token_ms, and the sum of squares they leave."""
    decodes, context, prefill, attended = rows.T
    columns = [np.ones_like(decodes), np.maximum(turn, prefill), attended, decodes, context, _mixed(rows)]
    matrix = np.stack(columns, axis=1)
    solution = non_negative(matrix / times_ms[:, None], np.ones_like(times_ms))
    fixed, token, attention, request, per_context, mixed = (float(value) for value in solution)
    terms = (fixed, turn * token, token, attention, request, per_context, mixed)
    coefficients = dict(zip(STEP_TERMS, terms, strict=True))
    rest = matrix @ solution / times_ms - 1
    return coefficients, float(rest @ rest)


def _mixed(rows: Array) -> Array:
    """1 for each step that both decodes and prefills."""
    return ((rows[:, 0] > 0) & (rows[:, 2] > 0)).astype(np.float64)
