"""What frequent switching costs users: `llumnix bench fairness`.

Multi-turn conversations on one engine, whose requests are ranked anew every so many steps: those that fall
behind are swapped out, those that come to the front swapped in (FastSwitch, arXiv 2411.18424, section 5). The
same load runs with swapping as others do it, with each of our parts added, and with each taken away, on the
engine core in virtual time (LLaMA-8B on A10, Qwen-32B on A100, 60 GB of host memory over PCIe 4) and on a
real engine here. The rows of one engine and variant are pooled too, for the tails of all its turns.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from llumnix.bench.fairness_runs import CPU, LAYER_FIRST, VARIANTS, Outcome, Scenario, pooled, run
from llumnix.bench.machine import describe_machine
from llumnix.cli.output_paths import OUTPUT_FILE

FREQUENCIES = (0.04, 0.02)
PATTERNS = ("random", "markov")
SIMULATED = {"llama-3-8b@a10": 1.0, "qwen-2.5-32b@a100-80g": 1.0}
"""Requests per second of each simulated model."""
CPU_RATE = 1e3  # requests per second: all conversations begin at once, and the engine sets the pace
BASES = ("per block", "batched")
ANY = "any"  # in a row over all frequencies or patterns
COUNT = click.IntRange(min=1)


def scenarios(engine: str, link: str, rate: float, requests: int, seeds: range) -> list[Scenario]:
    """Every frequency, pattern and variant. Variants take turns, so that a disturbance hits all of them."""
    variants = [*VARIANTS, *(LAYER_FIRST if engine != CPU else ())]
    return [
        Scenario(engine, frequency, pattern, variant, link, rate, requests, seed)
        for seed, frequency, pattern, variant in product(seeds, FREQUENCIES, PATTERNS, variants)
    ]


def rows(outcomes: list[Outcome]) -> Iterator[dict[str, Any]]:
    """A row per engine, frequency, pattern and variant, and one per engine and variant."""
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for outcome in outcomes:
        one = outcome.scenario
        groups.setdefault((one.engine, one.frequency, one.pattern, one.variant), []).append(outcome)
    for outcome in outcomes:
        one = outcome.scenario
        groups.setdefault((one.engine, ANY, ANY, one.variant), []).append(outcome)
    for (engine, frequency, pattern, variant), members in groups.items():
        keys = {"engine": engine, "frequency": frequency, "pattern": pattern, "variant": variant}
        yield {**pooled(members), **keys, "seed": [one.scenario.seed for one in members]}


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every engine, frequency and pattern: how much better each variant is than the first two."""
    found = []
    for row in rows:
        for base_name in BASES:
            keys = ("engine", "frequency", "pattern")
            base = next(
                other
                for other in rows
                if other["variant"] == base_name and all(other[key] == row[key] for key in keys)
            )
            if row["variant"] in ("per block", base_name):
                continue
            found.append(
                {
                    **{key: row[key] for key in (*keys, "variant")},
                    "against": base_name,
                    **{
                        f"{metric}_{tail}": base[f"{metric}_ms"][tail] / row[f"{metric}_ms"][tail]
                        for metric in ("ttft", "tbt")
                        for tail in ("p95", "p99", "p999")
                    },
                    "throughput": row["tokens_per_s"] / base["tokens_per_s"],
                }
            )
    return found


def _show(report: dict[str, Any]) -> None:
    console = Console()
    for engine, frequency, pattern in dict.fromkeys(
        (row["engine"], row["frequency"], row["pattern"]) for row in report["results"]
    ):
        rows = [
            row
            for row in report["results"]
            if (row["engine"], row["frequency"], row["pattern"]) == (engine, frequency, pattern)
        ]
        table = Table(
            title=f"{engine}, priorities {pattern} at {frequency}, {rows[0]['ttft_count']} requests"
        )
        titles = (
            "TTFT P95 s",
            "P99",
            "P99.9",
            "TBT P95 ms",
            "P99",
            "P99.9",
            "tokens/s",
            "blocks out",
            "copies",
            "copying s",
        )
        for title in ("variant", *titles):
            table.add_column(title, justify="right")
        for row in rows:
            table.add_row(
                row["variant"],
                *(f"{row['ttft_ms'][tail] / 1e3:.2f}" for tail in ("p95", "p99", "p999")),
                *(f"{row['tbt_ms'][tail]:.1f}" for tail in ("p95", "p99", "p999")),
                f"{row['tokens_per_s']:.0f}",
                f"{row['blocks_per_switch']:.1f}",
                f"{row['copied_out_copies'] + row['copied_in_copies']}",
                f"{row['copied_out_busy_s'] + row['copied_in_busy_s']:.2f}",
            )
        console.print(table)


@click.command(name="fairness")
@click.option("--json", "json_path", type=OUTPUT_FILE, help="Write the results to this file.")
@click.option(
    "--engine",
    type=click.Choice(["all", "simulated", CPU]),
    default="all",
    show_default=True,
    help="The cost models, the real engine on this machine, or both.",
)
@click.option(
    "--requests", type=COUNT, default=1000, show_default=True, help="Requests of each simulated run."
)
@click.option("--cpu-requests", type=COUNT, default=80, show_default=True, help="Requests of each real run.")
@click.option(
    "--link",
    type=click.Choice(["pcie4", "pcie4-light"]),
    default="pcie4",
    show_default=True,
    help="Between device and host, in simulated runs.",
)
@click.option("--jobs", type=COUNT, default=2, show_default=True, help="Simulated runs at a time.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--seeds", type=COUNT, default=1, show_default=True, help="Runs of each row, from --seed on.")
def command(
    json_path: Path | None,
    engine: str,
    requests: int,
    cpu_requests: int,
    link: str,
    jobs: int,
    seed: int,
    seeds: int,
) -> None:
    """Tails under priority updates, with swapping as others do it and with our parts added or taken away."""
    machine = describe_machine()
    outcomes: list[Outcome] = []
    drawn = range(seed, seed + seeds)
    if engine != CPU:
        todo = [
            scenario
            for name, rate in SIMULATED.items()
            for scenario in scenarios(name, link, rate, requests, drawn)
        ]
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            outcomes += pool.map(run, todo)
    if engine != "simulated":
        outcomes += map(run, scenarios(CPU, "memory", CPU_RATE, cpu_requests, drawn))
    results = list(rows(outcomes))
    report = {
        "benchmark": "fairness",
        "machine": machine,
        "config": {
            "engine": engine,
            "link": link,
            "requests": requests,
            "cpu_requests": cpu_requests,
            "seed": seed,
            "seeds": seeds,
        },
        "results": results,
        "gains": gains(results),
    }
    _show(report)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
