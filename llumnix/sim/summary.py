"""The numbers of a run, as the paper gives them.

Request latency: arrival to last token. Prefill latency: arrival to first token, queueing included. Decode
latency: mean time between a request's tokens, per request. Preemption loss: time from a preemption to the
request's next token, queueing and recomputing together, in seconds per request. All as clients saw it.
"""

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llumnix.sim.simulation import START_S, Simulation

Column = NDArray[np.float64]
SPREAD = ("mean", "p50", "p95", "p99", "max")


def columns_of(simulation: Simulation) -> dict[str, Column]:
    """The recorder's columns as arrays."""
    return {name: np.frombuffer(column) for name, column in simulation.recorder.columns.items() if column}


def latencies(columns: Mapping[str, Column]) -> dict[str, Column]:
    """Seconds per finished request: request, prefill, decode (those with two tokens at least) and the
    longest gap between two tokens."""
    ok = columns["failed"] == 0
    arrived, first = columns["arrived_s"][ok], columns["first_token_s"][ok]
    finished, tokens = columns["finished_s"][ok], columns["tokens"][ok]
    several = tokens > 1
    return {
        "request": finished - arrived,
        "prefill": first - arrived,
        "decode": (finished - first)[several] / (tokens[several] - 1),
        "longest_gap": columns["longest_gap_s"][ok][several],
    }


def spread(values: Column) -> dict[str, float]:
    """Mean, percentiles and the largest, in the unit of the values."""
    if not len(values):
        return dict.fromkeys(SPREAD, 0.0)
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {name: _short(value) for name, value in zip(SPREAD, (values.mean(), p50, p95, p99, values.max()))}


def summarize(simulation: Simulation) -> dict[str, Any]:
    """A run in numbers: plain values only, so that JSON of it is the same for the same run."""
    recorder, timeline = simulation.recorder, simulation.timeline
    columns = columns_of(simulation)
    scheduler = simulation.settings.config.scheduler
    result: dict[str, Any] = {
        "workload": simulation.settings.workload.name,
        "dispatch": scheduler.dispatch_policy,
        "pairing": scheduler.pairing_policy,
        "requests": recorder.opened,
        "finished": recorder.finished,
        "failed": recorder.failed,
        "virtual_s": _short(simulation.finished_at - START_S),
        "tokens": recorder.tokens,
        "instance_hours": _short(timeline.instance_s(simulation.finished_at) / 3600),
        "fragmentation": _short(timeline.mean("fragmented")),
        "memory_used": _short(timeline.mean("used")),
        "migrations": simulation.machine.committed,
        "kv_moved_gib": _short(simulation.links.kv_bytes / 2**30),
        "events": dict(sorted(simulation.scheduler.logged.items())),
    }
    if simulation.scheduler.policy_errors:
        result["policy_errors"] = dict(sorted(simulation.scheduler.policy_errors.items()))
    if not columns:
        return result
    result["latency_s"] = {name: spread(values) for name, values in latencies(columns).items()}
    result["preemptions"] = int(columns["preemptions"].sum())
    result["preemption_loss_s"] = _short(columns["preemption_loss_s"].mean())
    if 0 < columns["high"].sum() < len(columns["high"]):
        result["by_priority"] = {
            name: _of_priority(columns, high) for name, high in (("high", True), ("normal", False))
        }
    if recorder.tenants:
        result["tokens_by_tenant"] = dict(sorted(recorder.tenants.items()))
    return result


def _of_priority(columns: Mapping[str, Column], high: bool) -> dict[str, Any]:
    chosen = {name: values[columns["high"] == high] for name, values in columns.items()}
    return {
        "requests": len(chosen["number"]),
        "latency_s": {name: spread(values) for name, values in latencies(chosen).items()},
        "preemption_loss_s": _short(chosen["preemption_loss_s"].mean()),
    }


def timeline_of(simulation: Simulation) -> dict[str, Any]:
    """The cluster over time, for plots and files."""

    def plain(column: "array[float]") -> list[float | None]:
        return [None if value != value else _short(value) for value in column]

    return {
        **{name: plain(column) for name, column in simulation.timeline.columns.items()},
        "loads": {name: plain(column) for name, column in sorted(simulation.timeline.loads.items())},
    }


def _short(value: float) -> float:
    return float(f"{float(value):.6g}")
