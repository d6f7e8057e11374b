"""``llumnix bench validation``: one workload on a real cluster and in the simulator, side by side.

Profiles the engines first (or takes a cost model), runs the workload on ``llumnix serve`` through HTTP, then
the very same requests, settings and scheduler in virtual time. What clients saw is compared: P50 and P99 of
the time to the first token and of the mean time per token after it. The cost model knows nothing of the run
it is compared with.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from llumnix.bench.live_load import Streamed, quantiles_ms, real_cluster
from llumnix.bench.machine import describe_machine
from llumnix.bench.profile import parts, profile
from llumnix.cli.config_flags import config_options, resolve
from llumnix.core.config import ClusterConfig, Config, EngineConfig
from llumnix.core.config_source import Value
from llumnix.core.errors import ConfigurationError
from llumnix.sim.cost import CostModel, read_cost_model
from llumnix.sim.lengths import SHAREGPT_IN, SHAREGPT_OUT, Quantiles
from llumnix.sim.simulation import Settings, Simulation
from llumnix.sim.summary import columns_of
from llumnix.sim.traces import Trace
from llumnix.sim.workload import Arrival

BASE = Config(
    engine=EngineConfig(dtype="bfloat16", threads=1, max_model_len=2048), cluster=ClusterConfig(instances=2)
)
TOLERANCE = 0.15
WARM_UP = 8
WARM_UP_PROMPT, WARM_UP_TOKENS = 16, 8


@dataclass(frozen=True, slots=True)
class Seen:
    """What clients saw of one run: seconds, by request in order of arrival."""

    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]

    def quantiles(self) -> dict[str, dict[str, float]]:
        """In milliseconds."""
        return {"ttft_ms": quantiles_ms(self.ttft_s), "tpot_ms": quantiles_ms(self.tpot_s)}


def workload(
    *, rate: float, cv: float, count: int, shrink: float, tokens_max: int, seed: int
) -> list[Arrival]:
    """Lengths of ShareGPT conversations divided by ``shrink``, since a processor core is slow; Gamma arrivals
    (``cv`` 1: Poisson). Every answer has at least two tokens."""
    gaps_rng, in_rng, out_rng = np.random.default_rng(seed).spawn(3)
    shape = 1 / cv**2
    times = np.cumsum(gaps_rng.gamma(shape, 1 / (shape * rate), count))
    answers = np.clip(_shrunk(SHAREGPT_OUT, shrink).draw(out_rng, count), 2, tokens_max // 2)
    prompts = np.minimum(_shrunk(SHAREGPT_IN, shrink).draw(in_rng, count), tokens_max - answers)
    return [
        Arrival(float(at), int(prompt), int(answer))
        for at, prompt, answer in zip(times, prompts, answers, strict=True)
    ]


def _shrunk(lengths: Quantiles, shrink: float) -> Quantiles:
    points = tuple((share, max(1.0, tokens / shrink)) for share, tokens in lengths.points)
    return Quantiles(points, max(1, round(lengths.most / shrink)))


def run_real(config: Config, arrivals: Sequence[Arrival], seed: int) -> tuple[Seen, dict[str, Any]]:
    """The workload on a real cluster, and what the manager counted meanwhile."""
    with real_cluster(config) as cluster:
        warm_up = Arrival(0.0, WARM_UP_PROMPT, WARM_UP_TOKENS)
        cluster.run([warm_up] * WARM_UP, seed)  # connections are made with the first requests
        answers: list[Streamed] = cluster.run(arrivals, seed)
        rows = cluster.ask("instances")["data"]
        counted = {
            "migrations": cluster.ask("status")["migrations_committed"],
            "preemptions": sum(row["preemptions_total"] for row in rows),
        }
    return Seen(tuple(a.ttft_s for a in answers), tuple(a.tpot_s for a in answers)), counted


def run_simulated(
    config: Config, cost: CostModel, arrivals: Sequence[Arrival], seed: int
) -> tuple[Seen, dict[str, Any]]:
    """The same in virtual time."""
    simulation = Simulation(Settings(config, cost, Trace("validation", tuple(arrivals)), seed))
    simulation.run()
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


def compare(real: Seen, simulated: Seen) -> list[dict[str, Any]]:
    """One row for each percentile that counts; ``off``: simulated / real - 1."""
    found, expected = simulated.quantiles(), real.quantiles()
    return [
        {
            "latency": latency.removesuffix("_ms"),
            "percentile": percentile,
            "real_ms": expected[latency][percentile],
            "simulated_ms": found[latency][percentile],
            "off": round(found[latency][percentile] / expected[latency][percentile] - 1, 4),
        }
        for latency in ("ttft_ms", "tpot_ms")
        for percentile in ("p50", "p99")
    ]


def _show(report: dict[str, Any]) -> None:
    table = Table(title=report["workload"]["name"])
    for title in ("", "real, ms", "simulated, ms", "off by"):
        table.add_column(title, justify="right" if title else "left")
    for row in report["results"]:
        name = f"{row['latency'].upper()} {row['percentile'].upper()}"
        table.add_row(name, f"{row['real_ms']:.1f}", f"{row['simulated_ms']:.1f}", f"{row['off']:+.1%}")
    Console().print(table)
    worst = max(abs(row["off"]) for row in report["results"])
    word = "within" if worst <= TOLERANCE else "NOT within"
    print(f"{word} {TOLERANCE:.0%}; the worst is off by {worst:.1%}")


@click.command("validation")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write results there."
)
@click.option(
    "--cost-model",
    "cost_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Made by llumnix profile with the same settings; without one, it is made first.",
)
@click.option("--rate", type=float, default=2.0, show_default=True, help="Requests per second.")
@click.option(
    "--cv", type=float, default=1.0, show_default=True, help="Burstiness of arrivals; 1 is Poisson."
)
@click.option("--requests", type=click.IntRange(min=10), default=180, show_default=True)
@click.option(
    "--shrink", type=float, default=4.0, show_default=True, help="ShareGPT's lengths are divided by this."
)
@click.option("--seed", type=int, default=0, show_default=True)
@config_options
def command(
    json_file: Path | None,
    cost_file: Path | None,
    rate: float,
    cv: float,
    requests: int,
    shrink: float,
    seed: int,
    config_file: Path | None,
    **given: Value | None,
) -> None:
    """The same workload on a real cluster and in the simulator: how far apart are they?"""
    for name, value in (("rate", rate), ("cv", cv), ("shrink", shrink)):
        if not 0 < value < float("inf"):
            raise ConfigurationError(f"--{name} must be above 0, got {value}")
    config = resolve(config_file, given, BASE)
    machine = describe_machine()
    if cost_file is not None:
        cost, made = read_cost_model(cost_file), None
    else:
        with click.progressbar(length=parts(), label="profiling") as bar:
            made = profile(config, seed, bar.update)
        cost = made.cost
    arrivals = workload(
        rate=rate, cv=cv, count=requests, shrink=shrink, tokens_max=cost.max_model_len, seed=seed
    )
    real, real_counts = run_real(config, arrivals, seed)
    simulated, simulated_counts = run_simulated(config, cost, arrivals, seed)
    report = {
        "benchmark": "validation",
        "machine": machine,
        "seed": seed,
        "workload": {
            "name": f"ShareGPT lengths / {shrink:g} at {rate:g}/s, CV {cv:g}, {requests} requests",
            "rate": rate,
            "cv": cv,
            "requests": requests,
            "shrink": shrink,
            "seconds": round(arrivals[-1].at_s, 1),
        },
        "config": {name: asdict(getattr(config, name)) for name in ("engine", "scheduler", "cluster")},
        "results": compare(real, simulated),
        "real": {**real.quantiles(), **real_counts},
        "simulated": {**simulated.quantiles(), **simulated_counts},
        "cost_model": asdict(cost),
        "profile": None if made is None else made.report,
        "requests": [
            {"at_s": round(a.at_s, 3), "prompt": a.prompt_tokens, "output": a.output_tokens}
            | {"real": [round(real.ttft_s[i] * 1e3, 1), round(real.tpot_s[i] * 1e3, 2)]}
            | {"simulated": [round(simulated.ttft_s[i] * 1e3, 1), round(simulated.tpot_s[i] * 1e3, 2)]}
            for i, a in enumerate(arrivals)
        ],
    }
    if json_file is not None:
        json_file.write_text(json.dumps(report) + "\n", encoding="utf-8")
    _show(report)
