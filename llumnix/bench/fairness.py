"""What frequent switching costs users: `llumnix bench fairness`.

Multi-turn conversations on one engine, whose requests are ranked anew every so many steps: those that fall
behind are swapped out, those that come to the front swapped in (FastSwitch, arXiv 2411.18424, section 5). The
same load runs with swapping as others do it and with each of our parts added, on the engine core in virtual
time (LLaMA-8B on A10, Qwen-32B on A100, 60 GB of host memory over PCIe 4) and on a real engine here.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from llumnix.bench.conversations import ConversationLoad
from llumnix.bench.machine import describe_machine
from llumnix.core.config import EngineConfig, SchedulerConfig, SwapConfig
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.swap_copier import SwapCopier
from llumnix.instance.torch_executor import TorchExecutor
from llumnix.sim.roofline import cost_model
from llumnix.sim.swap import HOST_LINKS, VirtualCopier
from llumnix.sim.virtual_engine import VirtualExecutor, VirtualTime
from llumnix.sim.workload import Arrival, Conversations, Synthetic, Turn

HOST_GIB = 60e9 / (1 << 30)
TURNS_MEAN = 5.5
THINK_S = 5.0
CONTEXT_MAX = 4096
FREQUENCIES = (0.04, 0.02)
PATTERNS = ("random", "markov")

PLAIN = SwapConfig(
    block_groups=False, swap_copies="piece", swap_async=False, swap_reuse=False, swap_ahead=False
)
BATCHED = replace(PLAIN, swap_copies="run")
GROUPS = replace(BATCHED, block_groups=True, swap_copies="auto")
ASYNC = replace(GROUPS, swap_async=True)
REUSE = replace(ASYNC, swap_reuse=True)
VARIANTS = {
    "per block": PLAIN,
    "batched": BATCHED,
    "+ groups": GROUPS,
    "+ async": ASYNC,
    "+ reuse": REUSE,
    "+ ahead (all)": replace(REUSE, swap_ahead=True),
}
"""Each variant has everything the one before it has. The first copies each block's layers, keys and values
one by one and waits, as vLLM 0.3 did; the second hands all blocks over in one batch, but waits and has them
scattered."""

SIMULATED = {"llama-3-8b@a10": 1.0, "qwen-2.5-32b@a100-80g": 1.0}
"""Requests per second of each simulated model."""

CPU = "cpu"
CPU_MODEL = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=704,
    layers=4,
    heads=8,
    kv_heads=8,
    head_dim=64,
    max_len=8192,
)
"""A small Llama with much KV for its size, 8 KiB a token in bfloat16: a step of few ms is to copying a block
about what it is on a GPU."""
CPU_ENGINE = EngineConfig(
    kind="torch",
    device="cpu",
    kv_blocks=192,
    threads=1,
    batch_max=32,
    step_tokens_max=256,
    waiting_max=10_000,
)
"""One compute thread, so that a core is left for what a GPU's copy engines do."""
CPU_HOST_BLOCKS = 1024
CPU_SHRINK, CPU_THINK_S = 6.0, 0.2
CPU_RATE = 1e3  # requests per second: all conversations begin at once, and the engine sets the pace


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run. ``engine`` is a cost model's name, or ``cpu``; ``link`` is what a simulated one swaps over;
    ``rate`` in requests per second."""

    engine: str
    frequency: float
    pattern: str
    variant: str
    link: str
    rate: float
    requests: int
    seed: int


def conversations(scenario: Scenario, *, shrink: float, think_s: float, tokens_max: int) -> list[Arrival]:
    """Multi-turn conversations with ShareGPT's lengths divided by ``shrink``, mean pauses of ``think_s``."""
    drawn = Synthetic(
        "sharegpt",
        scenario.rate,
        scenario.requests,
        scenario.seed,
        tokens_max=int(tokens_max * shrink),
        conversations=Conversations(TURNS_MEAN, think_s),
    )
    return [
        replace(
            arrival,
            prompt_tokens=ceil(arrival.prompt_tokens / shrink),
            output_tokens=ceil(arrival.output_tokens / shrink),
            turns=tuple(
                Turn(turn.think_s, ceil(turn.new_tokens / shrink), ceil(turn.output_tokens / shrink))
                for turn in arrival.turns
            ),
        )
        for arrival in drawn.arrivals()
    ]


def run(scenario: Scenario) -> dict[str, Any]:
    """One row."""
    swap = replace(
        VARIANTS[scenario.variant], rerank_frequency=scenario.frequency, rerank_by=scenario.pattern
    )
    if scenario.engine == CPU:
        return _run_real(scenario, replace(swap, host_blocks=CPU_HOST_BLOCKS))
    return _run_simulated(scenario, replace(swap, host_gib=HOST_GIB))


def simulated(
    scenario: Scenario, swap: SwapConfig, engine_type: type[InProcessEngine] = InProcessEngine
) -> tuple[InProcessEngine, VirtualTime, list[Arrival]]:
    """An engine in virtual time, and its load."""
    config = EngineConfig(waiting_max=100_000, batch_max=256, step_tokens_max=512)
    clock = VirtualTime()
    executor = VirtualExecutor(cost_model(scenario.engine), config, swap, HOST_LINKS[scenario.link], clock)
    engine = engine_type(executor, config, swap=swap)
    engine.configure(SchedulerConfig(preemption_policy="swap"))
    longest = min(CONTEXT_MAX, executor.max_model_len)
    return engine, clock, conversations(scenario, shrink=1.0, think_s=THINK_S, tokens_max=longest)


def _run_simulated(scenario: Scenario, swap: SwapConfig) -> dict[str, Any]:
    engine, clock, arrivals = simulated(scenario, swap)
    return _measured(scenario, engine, arrivals, clock, clock.sleep_until)


def _run_real(scenario: Scenario, swap: SwapConfig) -> dict[str, Any]:
    executor = TorchExecutor.from_random(CPU_MODEL, CPU_ENGINE, seed=0, pool_name="bench-fairness", swap=swap)
    engine = InProcessEngine(executor, CPU_ENGINE, swap=swap)
    longest = CPU_ENGINE.kv_blocks * CPU_ENGINE.block_size // 2
    arrivals = conversations(scenario, shrink=CPU_SHRINK, think_s=CPU_THINK_S, tokens_max=longest)
    engine.configure(SchedulerConfig(preemption_policy="swap"))
    try:
        return _measured(scenario, engine, arrivals, time.perf_counter, _sleep_until)
    finally:
        executor.close()


def _sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.perf_counter()))


def _measured(
    scenario: Scenario,
    engine: InProcessEngine,
    arrivals: list[Arrival],
    clock: Callable[[], float],
    sleep_until: Callable[[float], None],
) -> dict[str, Any]:
    vocabulary = min(256, engine.executor.vocab_size - 1)
    seen = ConversationLoad(arrivals, vocabulary=vocabulary, seed=scenario.seed).run(
        engine, clock, sleep_until
    )
    copier, load = engine.executor.copier, engine.load()
    assert isinstance(copier, VirtualCopier | SwapCopier) and load.swap is not None
    return {
        **asdict(scenario),
        "ttft_ms": _tail(seen.ttft_s),
        "tbt_ms": _tail(seen.gaps_s),
        "tokens_per_s": seen.tokens / seen.seconds,
        "seconds": seen.seconds,
        "steps": seen.steps,
        "step_ms_mean": seen.step_s / seen.steps * 1e3,
        "preemptions": load.preemptions_total,
        "blocks_per_switch": load.swap.out_blocks / max(1, load.swap.swapped_out),
        "prefix_blocks": load.swap.prefix_blocks,
        "host_full": load.swap.host_full,
        "swapped": {
            direction.value: {
                "jobs": totals.jobs,
                "blocks": totals.blocks,
                "copies": totals.copies,
                "busy_s": totals.busy_s,
            }
            for direction, totals in copier.totals().items()
        },
    }


def _tail(seconds: list[float]) -> dict[str, float]:
    return {
        name: float(np.percentile(seconds, share)) * 1e3
        for name, share in (("p50", 50), ("p95", 95), ("p99", 99), ("p999", 99.9))
    }


def scenarios(engine: str, link: str, rate: float, requests: int, seed: int) -> list[Scenario]:
    """Every frequency, pattern and variant."""
    return [
        Scenario(engine, frequency, pattern, variant, link, rate, requests, seed)
        for frequency, pattern, variant in product(FREQUENCIES, PATTERNS, VARIANTS)
    ]


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every engine, frequency and pattern: how much better each variant is than the first two."""
    found = []
    for row in rows:
        for base_name in ("per block", "batched"):
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
            title=f"{engine}, priorities {pattern} at {frequency}, {rows[0]['rate']:.2f} requests/s"
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
                f"{sum(way['copies'] for way in row['swapped'].values())}",
                f"{sum(way['busy_s'] for way in row['swapped'].values()):.2f}",
            )
        console.print(table)


@click.command(name="fairness")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results to this file.")
@click.option(
    "--engine",
    type=click.Choice(["all", "simulated", CPU]),
    default="all",
    show_default=True,
    help="The cost models, the real engine on this machine, or both.",
)
@click.option("--requests", default=1000, show_default=True, help="Requests of each simulated run.")
@click.option("--cpu-requests", default=90, show_default=True, help="Requests of each real run.")
@click.option(
    "--link",
    type=click.Choice(list(HOST_LINKS)),
    default="pcie4",
    show_default=True,
    help="Between device and host, in simulated runs.",
)
@click.option("--jobs", default=2, show_default=True, help="Simulated runs at a time.")
@click.option("--seed", default=0, show_default=True)
def command(
    json_path: Path | None, engine: str, requests: int, cpu_requests: int, link: str, jobs: int, seed: int
) -> None:
    """Tails under priority updates, with swapping as others do it and with each of our parts added."""
    machine = describe_machine()
    rows: list[dict[str, Any]] = []
    if engine != CPU:
        todo = [
            scenario
            for name, rate in SIMULATED.items()
            for scenario in scenarios(name, link, rate, requests, seed)
        ]
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            rows += pool.map(run, todo)
    if engine != "simulated":
        rows += map(run, scenarios(CPU, "memory", CPU_RATE, cpu_requests, seed))
    report = {
        "benchmark": "fairness",
        "machine": machine,
        "config": {
            "engine": engine,
            "link": link,
            "requests": requests,
            "cpu_requests": cpu_requests,
            "seed": seed,
        },
        "results": rows,
        "gains": gains(rows),
    }
    _show(report)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
