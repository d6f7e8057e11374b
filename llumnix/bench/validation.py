"""``llumnix bench validation``: one workload on a real cluster and in the simulator, side by side.

Profiles the engines first (or takes a cost model), runs the workload on ``llumnix serve`` through HTTP, then
the very same requests, settings and scheduler in virtual time. What clients saw is compared: P50 and P99 of
the time to the first token and of the mean time per token after it. The cost model knows nothing of the run
it is compared with.

A millisecond decides which requests meet on an instance, and a handful of meetings is a P99. So one virtual
run is one draw, as one real run is: several real ones are made, and SIMULATED_RUNS, each with steps that
scatter anew and with requests as late as real clients were in sending theirs, drawn request by request. The
percentiles compared are those of all runs of a side together; how far single runs scatter stands beside them.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from llumnix.bench.live_load import LENGTHS, Load, quantiles_ms, real_cluster
from llumnix.bench.machine import OTHERS_MAX, OthersCpu, describe_machine, warn_of_others
from llumnix.bench.profile import parts, profile
from llumnix.cli.config_flags import config_options, resolve
from llumnix.cli.output_paths import OUTPUT_FILE
from llumnix.core.config import ClusterConfig, Config, EngineConfig, SwapConfig
from llumnix.core.config_source import Value
from llumnix.core.errors import LlumnixError
from llumnix.sim.cost import CostModel, read_cost_model
from llumnix.sim.simulation import Settings, Simulation
from llumnix.sim.summary import columns_of
from llumnix.sim.traces import Trace
from llumnix.sim.workload import Arrival

BASE = Config(
    engine=EngineConfig(dtype="bfloat16", threads=1, max_model_len=2048),
    swap=SwapConfig(host_share=0.0),
    cluster=ClusterConfig(instances=2),
)
TOLERANCE = 0.15
REAL_RUNS = 6
SIMULATED_RUNS = 20
WARM_UP = 8
WARM_UP_PROMPT, WARM_UP_TOKENS = 16, 8


@dataclass(frozen=True, slots=True)
class Seen:
    """What clients saw of one run: seconds, by request in order of arrival. ``late_s``: how long after its
    time each was sent."""

    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    late_s: tuple[float, ...] = ()

    def quantiles(self) -> dict[str, dict[str, float]]:
        """In milliseconds."""
        return {"ttft_ms": quantiles_ms(self.ttft_s), "tpot_ms": quantiles_ms(self.tpot_s)}


def run_real(
    config: Config, arrivals: Sequence[Arrival], repeats: int, seed: int
) -> tuple[list[Seen], dict[str, Any]]:
    """The workload on a real cluster, so often, and what the manager counted meanwhile. One run that others
    on the machine disturbed is done again, and the calmest count."""
    runs: list[tuple[float, int, Seen, dict[str, int]]] = []
    with real_cluster(config) as cluster:
        warm_up = Arrival(0.0, WARM_UP_PROMPT, WARM_UP_TOKENS)
        cluster.run([warm_up] * WARM_UP, seed)  # connections are made with the first requests
        while len(runs) <= repeats and sum(share <= OTHERS_MAX for share, *_ in runs) < repeats:
            before, others = cluster.counted(), OthersCpu()
            answers = cluster.run(arrivals, seed)
            share, after = others.share(), cluster.counted()
            seen = Seen(
                tuple(a.ttft_s for a in answers),
                tuple(a.tpot_s for a in answers),
                tuple(a.sent_s - a.arrival.at_s for a in answers),
            )
            runs.append((share, len(runs), seen, {name: after[name] - before[name] for name in after}))
    shares = [share for share, *_ in runs]
    calmest = sorted(runs, key=lambda run: run[:2])[:repeats]
    counted = {name: [counts[name] for *_, counts in calmest] for name in calmest[0][3]}
    return [seen for _, _, seen, _ in calmest], {
        **counted,
        "others_cpu": max(share for share, *_ in calmest),
        "others_cpu_of_all_runs": shares,
    }


def run_simulated(
    config: Config, cost: CostModel, arrivals: Sequence[Arrival], seed: int
) -> tuple[Seen, dict[str, Any]]:
    """The same in virtual time. Raises LlumnixError if an answer fails, as a real run does."""
    simulation = Simulation(Settings(config, cost, Trace("validation", tuple(arrivals)), seed))
    simulation.run()
    if failed := simulation.recorder.failed:
        raise LlumnixError(f"{failed} answers failed in virtual time: the cluster refused them")
    columns = columns_of(simulation)
    order = np.argsort(columns["number"])
    arrived, first, last, tokens = (
        columns[name][order] for name in ("arrived_s", "first_token_s", "finished_s", "tokens")
    )
    counted = {
        "migrations": simulation.machine.committed,
        "preemptions": int(columns["preemptions"].sum()),
    }
    return Seen(tuple(first - arrived), tuple((last - first) / (tokens - 1))), counted


def simulate_runs(
    config: Config, cost: CostModel, arrivals: Sequence[Arrival], late_s: Sequence[float], seed: int
) -> tuple[list[Seen], dict[str, Any]]:
    """SIMULATED_RUNS runs in virtual time, their requests late by draws from ``late_s``, and what they
    counted. Latencies are from sending, as a real client's."""
    runs, counted = [], []
    for number in range(SIMULATED_RUNS):
        delays = np.random.default_rng((seed, number)).choice(np.maximum(late_s, 0.0), len(arrivals))
        sent = [replace(one, at_s=one.at_s + float(late)) for one, late in zip(arrivals, delays, strict=True)]
        order = sorted(range(len(sent)), key=lambda place: sent[place].at_s)
        draw = seed * SIMULATED_RUNS + number
        seen, counts = run_simulated(config, cost, [sent[place] for place in order], draw)
        back = np.argsort(order)
        runs.append(Seen(*(tuple(np.array(times)[back]) for times in (seen.ttft_s, seen.tpot_s))))
        counted.append(counts)
    return runs, {name: [counts[name] for counts in counted] for name in counted[0]}


def together(runs: Sequence[Seen]) -> Seen:
    """All runs as one."""
    return Seen(
        tuple(value for run in runs for value in run.ttft_s),
        tuple(value for run in runs for value in run.tpot_s),
    )


def compare(runs: Sequence[Seen], simulated: Sequence[Seen]) -> list[dict[str, Any]]:
    """One row for each percentile that counts. ``off``: simulated / real - 1, each side's runs taken
    together. What chance alone makes of one run, as shares of that: ``real_scatter``, the standard deviation
    of the single real runs, ``real_apart``, how far the worst of them is off, and both of the simulated."""
    found, expected = together(simulated).quantiles(), together(runs).quantiles()
    real_each, simulated_each = ([run.quantiles() for run in side] for side in (runs, simulated))
    rows = []
    for latency in ("ttft_ms", "tpot_ms"):
        for point in ("p50", "p99"):
            real_ms, simulated_ms = expected[latency][point], found[latency][point]
            row: dict[str, Any] = {
                "latency": latency.removesuffix("_ms"),
                "percentile": point,
                "real_ms": real_ms,
                "simulated_ms": simulated_ms,
                "off": round(simulated_ms / real_ms - 1, 4),
            }
            for side, each in (("real", real_each), ("simulated", simulated_each)):
                shares = [one[latency][point] / row[f"{side}_ms"] - 1 for one in each]
                row[f"{side}_scatter"] = round(statistics.stdev(shares), 4) if len(shares) > 1 else None
                row[f"{side}_apart"] = round(max(map(abs, shares)), 4)
            rows.append(row)
    return rows


def _show(report: dict[str, Any]) -> None:
    table = Table(title=report["load"]["name"])
    for title in ("", "real, ms", "simulated, ms", "off by", "one real run", "one simulated"):
        table.add_column(title, justify="right" if title else "left")
    for row in report["results"]:
        name = f"{row['latency'].upper()} {row['percentile'].upper()}"
        numbers = (f"{row['real_ms']:.1f}", f"{row['simulated_ms']:.1f}", f"{row['off']:+.1%}")
        table.add_row(name, *numbers, _chance(row, "real"), _chance(row, "simulated"))
    Console().print(table)
    worst = max(abs(row["off"]) for row in report["results"])
    word = "within" if worst <= TOLERANCE else "NOT within"
    print(f"{word} {TOLERANCE:.0%}; the worst is off by {worst:.1%}")
    warn_of_others(report["real"]["others_cpu"])


def _chance(row: dict[str, Any], side: str) -> str:
    """How single runs scatter; nothing where there is one only."""
    scatter = row[f"{side}_scatter"]
    return "" if scatter is None else f"±{scatter:.1%}"


@click.command("validation")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Write results there.")
@click.option(
    "--cost-model",
    "cost_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Made by llumnix profile with the same settings; without one, it is made first.",
)
@click.option("--lengths", type=click.Choice(sorted(LENGTHS)), default="burstgpt", show_default=True)
@click.option("--shrink", type=float, default=8.0, show_default=True, help="Lengths are divided by this.")
@click.option("--rate", type=float, default=10.0, show_default=True, help="Requests per second.")
@click.option("--cv", type=float, default=1.0, show_default=True, help="Burstiness of arrivals; 1: Poisson.")
@click.option("--requests", "count", type=click.IntRange(min=10), default=500, show_default=True)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=REAL_RUNS, show_default=True, help="Real runs."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@config_options
def command(
    json_file: Path | None,
    cost_file: Path | None,
    repeats: int,
    seed: int,
    config_file: Path | None,
    lengths: str,
    shrink: float,
    rate: float,
    cv: float,
    count: int,
    **given: Value | None,
) -> None:
    """The same workload on a real cluster and in the simulator: how far apart are they?

    Settings are those of serve, from two instances of SmolLM2 with one thread each on. Takes about ten
    minutes, on a machine that has nothing else to do."""
    load = Load(lengths, shrink, rate, cv, count)
    config = resolve(config_file, given, BASE)
    machine = describe_machine()
    if cost_file is not None:
        cost, made = read_cost_model(cost_file), None
    else:
        with click.progressbar(length=parts(), label="profiling") as bar:
            made = profile(config, seed, bar.update)
        cost = made.cost
    arrivals = load.arrivals(cost.max_model_len, seed)
    runs, real_counts = run_real(config, arrivals, repeats, seed)
    late_s = [late for run in runs for late in run.late_s]
    simulated, simulated_counts = simulate_runs(config, cost, arrivals, late_s, seed)
    report = {
        "benchmark": "validation",
        "machine": machine,
        "seed": seed,
        "load": {"name": load.name, **asdict(load), "seconds": round(arrivals[-1].at_s, 1)},
        "config": {name: asdict(getattr(config, name)) for name in ("engine", "scheduler", "cluster")},
        "results": compare(runs, simulated),
        "real": {"runs": [run.quantiles() for run in runs], **real_counts},
        "sent_late_ms": quantiles_ms(late_s),
        "simulated": {
            **together(simulated).quantiles(),
            "runs": [run.quantiles() for run in simulated],
            **simulated_counts,
        },
        "cost_model": asdict(cost),
        "profile": None if made is None else made.report,
        "requests": [
            {"at_s": round(arrival.at_s, 3), "prompt": arrival.prompt_tokens, "output": arrival.output_tokens}
            | {
                "real_ms": [_ms(run, number) for run in runs],
                "simulated_ms": [_ms(run, number) for run in simulated],
            }
            for number, arrival in enumerate(arrivals)
        ],
    }
    if json_file is not None:
        json_file.write_text(json.dumps(report) + "\n", encoding="utf-8")
    _show(report)


def _ms(seen: Seen, number: int) -> tuple[float, float]:
    """A request's (time to first token, time per token)."""
    return round(seen.ttft_s[number] * 1e3, 1), round(seen.tpot_s[number] * 1e3, 2)
