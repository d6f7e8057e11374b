"""``llumnix bench live``: what migration and priorities are worth on a real cluster, under bursts.

One cluster of real engines whose KV pools are small enough to run out. Compared on the very same requests,
alternating within one run: migration off (dispatch alone) against on; or priorities of a tenth of the
requests ignored against used. Policies are changed while the cluster runs, as ``llumnix policy set`` does.
"""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from llumnix.bench.live_load import LENGTHS, Load, RealCluster, Streamed, quantiles_ms, real_cluster
from llumnix.bench.live_model import cut_model
from llumnix.bench.machine import OthersCpu, describe_machine, warn_of_others
from llumnix.cli.config_flags import config_options, resolve
from llumnix.cli.output_paths import OUTPUT_FILE
from llumnix.core.config import ClusterConfig, Config, EngineConfig, SchedulerConfig, SwapConfig
from llumnix.core.config_source import Value
from llumnix.sim.workload import Arrival

BASE = Config(
    engine=EngineConfig(dtype="bfloat16", threads=1, max_model_len=1024, kv_blocks=80),
    swap=SwapConfig(host_share=0.0),
    scheduler=SchedulerConfig(queue_blocks_factor=1000.0),
    cluster=ClusterConfig(instances=4),
)
HIGH_EVERY = 10
"""One request in so many, in order of arrival, is marked."""
COUNTS = ("queued", "stopped", "preemptions", "migrations")
WARM_UP = Arrival(0.0, 16, 8)
WARM_UPS = 8
STOP_S = 1.0
"""A first token later than this waited in a queue; a gap longer than this was a preemption's."""
SHORT_TOKENS = 10
"""The mean time per token of so few is one or two steps: that of a neighbour's prefill, as it happens."""


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to run the workload. ``priorities``: the marked requests have one."""

    name: str
    pairing: str
    priorities: bool


DISPATCH_ONLY = Mode("migration off", "none", priorities=False)
MIGRATING = Mode("migration on", "freeness", priorities=False)
PRIORITIES = Mode("priorities", "freeness", priorities=True)
COMPARISONS = {
    "migration": ((DISPATCH_ONLY, MIGRATING), ("all",)),
    "priorities": ((MIGRATING, PRIORITIES), ("all", "high", "normal")),
}
"""What is compared: (without, with), and for which requests."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one mode once. ``high``: which answers are of marked requests; ``moves``: how often each
    was moved."""

    mode: Mode
    answers: tuple[Streamed, ...]
    high: tuple[bool, ...]
    moves: tuple[int, ...]
    preemptions: int
    migrations: int

    def of(self, which: str) -> list[Streamed]:
        """The answers of ``all``, ``high`` or ``normal`` requests."""
        wanted = {"all": (True, False), "high": (True,), "normal": (False,)}[which]
        return [answer for answer, high in zip(self.answers, self.high, strict=True) if high in wanted]


def run_modes(cluster: RealCluster, modes: Sequence[Mode], load: Load, repeats: int, seed: int) -> list[Run]:
    """All modes on the same requests, ``repeats`` times on others each, the order turned each time."""
    cluster.run([WARM_UP] * WARM_UPS, seed)  # connections are made with the first requests
    runs = []
    _, seen = cluster.moved(0)
    for number in range(repeats):
        arrivals = load.arrivals(cluster.max_model_len, seed + number)
        high = tuple(place % HIGH_EVERY == 0 for place in range(len(arrivals)))
        for mode in modes[:: -1 if number % 2 else 1]:
            cluster.order("policy", {"kind": "pairing", "name": mode.pairing, "settings": {}})
            asked = [
                replace(arrival, execution_priority=int(mode.priorities and marked))
                for arrival, marked in zip(arrivals, high, strict=True)
            ]
            before = cluster.counted()
            answers = cluster.run(asked, seed + number)
            counts = {name: now - before[name] for name, now in cluster.counted().items()}
            moved, seen = cluster.moved(seen)
            moves = Counter(moved)
            each = tuple(moves[answer.request_id] for answer in answers)
            runs.append(Run(mode, tuple(answers), high, each, **counts))
    return runs


def latencies(runs: Sequence[Run], which: str) -> dict[str, Any]:
    """Of one mode's runs together, in ms."""
    answers = [answer for run in runs for answer in run.of(which)]
    return {
        "requests": len(answers),
        "ttft_ms": quantiles_ms([answer.ttft_s for answer in answers]),
        "tpot_ms": quantiles_ms([answer.tpot_s for answer in answers]),
        "longest_gap_ms": quantiles_ms([answer.longest_gap_s for answer in answers]),
        "request_ms": quantiles_ms([answer.last_s - answer.sent_s for answer in answers]),
    }


def slowest(runs: Sequence[Run]) -> dict[str, int]:
    """What the hundredth of the answers with the longest time per token have in common."""
    pairs = [pair for run in runs for pair in zip(run.answers, run.moves, strict=True)]
    pairs.sort(key=lambda pair: -pair[0].tpot_s)
    worst = pairs[: max(1, len(pairs) // 100)]
    return {
        "answers": len(worst),
        "short": sum(answer.tokens <= SHORT_TOKENS for answer, _ in worst),
        "stopped": sum(answer.longest_gap_s >= STOP_S for answer, _ in worst),
        "moved": sum(moves > 0 for _, moves in worst),
    }


def results_of(runs: Sequence[Run], compared: str) -> list[dict[str, Any]]:
    """One row for each mode, over its repeats."""
    rows = []
    modes, kinds = COMPARISONS[compared]
    for mode in modes:
        ours = [run for run in runs if run.mode == mode]
        rows.append(
            {
                "mode": mode.name,
                "runs": len(ours),
                "preemptions": sum(run.preemptions for run in ours),
                "migrations": sum(run.migrations for run in ours),
                "queued": sum(answer.ttft_s >= STOP_S for run in ours for answer in run.answers),
                "stopped": sum(answer.longest_gap_s >= STOP_S for run in ours for answer in run.answers),
                "slowest": slowest(ours),
                **{which: latencies(ours, which) for which in kinds},
                "each_run_p99": [
                    {
                        name: values["p99"]
                        for name, values in latencies([run], "all").items()
                        if name != "requests"
                    }
                    for run in ours
                ],
            }
        )
    return rows


def requests_of(run: Run) -> list[dict[str, Any]]:
    """Every request of a run, in order of arrival: a P99 of so few is one or two of them."""
    return [
        {
            "at_s": round(answer.arrival.at_s, 3),
            "prompt": answer.arrival.prompt_tokens,
            "output": answer.tokens,
            "high": high,
            "moves": moves,
            "ttft_ms": round(answer.ttft_s * 1e3, 1),
            "tpot_ms": round(answer.tpot_s * 1e3, 2),
            "longest_gap_ms": round(answer.longest_gap_s * 1e3, 1),
        }
        for answer, high, moves in zip(run.answers, run.high, run.moves, strict=True)
    ]


def gains_of(rows: Sequence[dict[str, Any]], compared: str) -> list[dict[str, Any]]:
    """How many times smaller each latency is with what is compared than without. ``each_run_p99``: in every
    repeat by itself, all requests."""
    gains = []
    for which in COMPARISONS[compared][1]:
        before, after = (row[which] for row in rows)
        ratios = {
            name: {point: round(before[name][point] / after[name][point], 3) for point in before[name]}
            for name in before
            if name != "requests"
        }
        gains.append({"requests": which, **ratios})
    pairs = zip(*(row["each_run_p99"] for row in rows), strict=True)
    apart = [{name: round(before[name] / after[name], 3) for name in before} for before, after in pairs]
    return [{**gains[0], "each_run_p99": apart}, *gains[1:]]


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['load']['name']}; times in ms", box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    for title in ("count", "TTFT P50", "P99", "TPOT P50", "P99", "gap P99"):
        table.add_column(title, justify="right")
    for row in report["results"]:
        for which in COMPARISONS[report["compared"]][1]:
            found = row[which]
            points = [found[name][point] for name in ("ttft_ms", "tpot_ms") for point in ("p50", "p99")]
            points.append(found["longest_gap_ms"]["p99"])
            name = row["mode"] if which == "all" else f"  {which}"
            numbers = (f"{point:.0f}" for point in points)
            table.add_row(name, str(found["requests"]), *numbers)
    Console().print(table)
    for gain in report["gains"]:
        parts = (
            f"{name.removesuffix('_ms').replace('_', ' ')} {gain[name]['p99']:.2f}"
            for name in ("ttft_ms", "tpot_ms", "longest_gap_ms", "request_ms")
        )
        print(f"P99 times smaller, {gain['requests']} requests: {', '.join(parts)}")
    for row in report["results"]:
        counts = ", ".join(f"{row[name]} {name}" for name in COUNTS)
        print(f"{row['mode']}: {counts}; slowest answers per token: {row['slowest']}")
    warn_of_others(report["others_cpu"])


@click.command("live")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Write results there.")
@click.option("--compare", type=click.Choice(sorted(COMPARISONS)), default="migration", show_default=True)
@click.option("--lengths", type=click.Choice(sorted(LENGTHS)), default="sharegpt", show_default=True)
@click.option("--shrink", type=float, default=4.0, show_default=True, help="Lengths are divided by this.")
@click.option(
    "--layers",
    type=click.IntRange(min=0),
    default=6,
    show_default=True,
    help="Of a torch engine's model only so many; 0: all.",
)
@click.option("--rate", type=float, default=5.0, show_default=True, help="Requests per second.")
@click.option("--cv", type=float, default=2.0, show_default=True, help="Burstiness of arrivals; 1: Poisson.")
@click.option("--requests", "count", type=click.IntRange(min=10), default=180, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@config_options
def command(
    json_file: Path | None,
    compare: str,
    repeats: int,
    seed: int,
    config_file: Path | None,
    lengths: str,
    shrink: float,
    layers: int,
    rate: float,
    cv: float,
    count: int,
    **given: Value | None,
) -> None:
    """Bursts on a real cluster: migration off and on, or priorities ignored and used
    (with migration on).

    Settings are those of serve, from four instances of SmolLM2's first layers with one thread and little KV
    each on. Takes about five minutes, on a machine that has nothing else to do."""
    load = Load(lengths, shrink, rate, cv, count)
    config = resolve(config_file, given, BASE)
    machine = describe_machine()
    model = config.engine.model
    layers = layers if config.engine.kind == "torch" else 0
    cutting = cut_model(model, layers) if layers else nullcontext(model)
    with cutting as name, real_cluster(replace(config, engine=replace(config.engine, model=name))) as cluster:
        others = OthersCpu()
        runs = run_modes(cluster, COMPARISONS[compare][0], load, repeats, seed)
        others_cpu = others.share()
    rows = results_of(runs, compare)
    report = {
        "benchmark": "live",
        "compared": compare,
        "machine": machine,
        "seed": seed,
        "repeats": repeats,
        "others_cpu": others_cpu,
        "load": {"name": load.name, **asdict(load)},
        "layers": layers,
        "config": {name: asdict(getattr(config, name)) for name in ("engine", "scheduler", "cluster")},
        "results": rows,
        "gains": gains_of(rows, compare),
        "runs": [{"mode": run.mode.name, "requests": requests_of(run)} for run in runs],
    }
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _show(report)
