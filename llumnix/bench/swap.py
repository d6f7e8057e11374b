"""What swapping KV between device and host memory costs: `llumnix bench swap`.

The copies of one swap by layout and allocation (swap_transfers.py); what decode steps lose to swaps beside
them (swap_steps.py); how long the runs are that a swap copies after long churn in a pool that is 90 % full
(block_churn.py); how many blocks a switch copies with and without reuse, and what the bookkeeping costs
(swap_switches.py).
"""

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from llumnix.bench.block_churn import BlockChurn
from llumnix.bench.machine import describe_machine
from llumnix.bench.swap_steps import measure_steps
from llumnix.bench.swap_switches import measure_switches
from llumnix.bench.swap_transfers import (
    ALLOCATIONS,
    FILL,
    WARM_UP_TICKS,
    measure_transfers,
    submission_us,
)
from llumnix.cli.output_paths import OUTPUT_FILE
from llumnix.core.messages.control import KvLayout
from llumnix.instance.block_manager import BlockManager

LAYOUTS = {
    "smollm2-135m": KvLayout(1, layers=30, kv_heads=3, block_size=16, head_dim=64, dtype="bfloat16"),
    "llama-3-8b": KvLayout(1, layers=32, kv_heads=8, block_size=16, head_dim=128, dtype="bfloat16"),
}
CHURN_POOLS = (1024, 2048, 8192)
SWAP_BLOCKS_MAX = 256
"""Churn seldom brings longer requests, and a pool below the least of those may never take the next one."""
CHURN_TICKS = 2000
CHURN_SEEDS = 8
COLUMNS = (
    *("blocks", "copies", "bytes_per_copy", "plan_us_p50", "swap_out_ms_p50", "swap_in_ms_p50"),
    *("gb_s", "share_of_one_copy"),
)
TITLES = ("blocks", "copies", "bytes a copy", "plan µs", "out ms", "in ms", "GB/s", "share of one copy")


def churn_rows(seed: int) -> list[dict[str, Any]]:
    """Mean runs of swapped-out requests, by pool size and allocation, over CHURN_SEEDS histories.
    ``mean_run_blocks_by_seed`` has each; no run can be longer than a swap (``blocks_per_swap``)."""
    rows = []
    for blocks in CHURN_POOLS:
        for allocation in ALLOCATIONS:
            results = []
            for history in range(seed, seed + CHURN_SEEDS):
                manager = BlockManager(blocks, grouped=allocation == "grouped")
                results.append(BlockChurn(manager, seed=history, fill=FILL).run(CHURN_TICKS, WARM_UP_TICKS))
            swaps, copied = sum(one.swaps for one in results), sum(one.blocks for one in results)
            rows.append(
                {
                    "pool_blocks": blocks,
                    "allocation": allocation,
                    "fill": statistics.mean(one.fill for one in results),
                    "resident_requests": statistics.mean(one.resident for one in results),
                    "swaps": swaps,
                    "blocks_per_swap": copied / max(1, swaps),
                    "mean_run_blocks": copied / max(1, sum(one.runs for one in results)),
                    "mean_run_of_a_block": sum(one.run_squares for one in results) / max(1, copied),
                    "mean_run_blocks_by_seed": [one.mean_run for one in results],
                }
            )
    return rows


def _show(report: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"one swap, KV of {report['config']['model']}")
    for title in ("layout", "allocation", "submitted", *TITLES):
        table.add_column(title, justify="right")
    for row in report["results"]:
        numbers = (
            f"{row[column]:,.0f}" if row[column] >= 100 else f"{row[column]:.2f}" for column in COLUMNS
        )
        table.add_row(row["layout"], row["allocation"], row["submission"], *numbers)
    console.print(table)
    submitted = report["submission"]
    console.print(
        f"handing a swap to the copier: {submitted['begin_us_p50']:.0f} µs of the engine's thread, "
        f"done after {submitted['until_done_ms_p50']:.2f} ms"
    )
    beside = Table(title="decode steps with swaps beside them")
    for column in ("swaps submitted", "step ms p50", "mean", "MB/s", "swap ms p50"):
        beside.add_column(column, justify="right")
    for row in report["steps"]:
        names = ("step_ms_p50", "step_ms_mean", "mb_s", "swap_ms_p50")
        beside.add_row(row["beside"], *(f"{row[name]:.2f}" for name in names))
    console.print(beside)
    churn = Table(title=f"runs under churn, pool {FILL:.0%} full")
    titles = ("pool blocks", "allocation", "fill", "requests", "blocks per swap", "mean run", "by seed")
    for column in (*titles, "of a block"):
        churn.add_column(column, justify="right")
    for row in report["churn"]:
        churn.add_row(
            str(row["pool_blocks"]),
            row["allocation"],
            f"{row['fill']:.2f}",
            f"{row['resident_requests']:.0f}",
            f"{row['blocks_per_swap']:.1f}",
            f"{row['mean_run_blocks']:.1f}",
            f"{min(row['mean_run_blocks_by_seed']):.1f} to {max(row['mean_run_blocks_by_seed']):.1f}",
            f"{row['mean_run_of_a_block']:.1f}",
        )
    console.print(churn)
    switches = Table(title="switches under priority updates, in virtual time; the core in real time")
    for column in ("variant", "switches", "blocks out", "reused", "core µs a step", "step ms"):
        switches.add_column(column, justify="right")
    for row in report["switches"]:
        columns = ("blocks_per_switch", "reused_blocks_per_switch", "core_us", "step_ms")
        switches.add_row(row["variant"], str(row["switches"]), *(f"{row[name]:.1f}" for name in columns))
    console.print(switches)


@click.command(name="swap")
@click.option("--json", "json_path", type=OUTPUT_FILE, help="Write the results to this file.")
@click.option("--model", type=click.Choice(list(LAYOUTS)), default="smollm2-135m", show_default=True)
@click.option(
    "--blocks",
    type=click.IntRange(1, SWAP_BLOCKS_MAX),
    default=64,
    show_default=True,
    help="Blocks per swap.",
)
@click.option(
    "--pool-blocks",
    type=click.IntRange(min=CHURN_POOLS[0]),
    default=2048,
    show_default=True,
    help="Blocks of each pool, device and host.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=60, show_default=True, help="Swaps per row.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def command(
    json_path: Path | None, model: str, blocks: int, pool_blocks: int, repeats: int, device: str, seed: int
) -> None:
    """Copies, bandwidth and bookkeeping of swapping KV to host memory."""
    machine = describe_machine()
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    where = torch.device(kind)
    one = LAYOUTS[model]
    layout = KvLayout(pool_blocks, one.layers, one.kv_heads, one.block_size, one.head_dim, one.dtype)
    results = measure_transfers(layout, where, blocks=blocks, repeats=repeats, seed=seed)
    report = {
        "benchmark": "swap",
        "machine": machine,
        "config": {
            "model": model,
            "blocks": blocks,
            "pool_blocks": pool_blocks,
            "repeats": repeats,
            "device": kind,
            "seed": seed,
        },
        "results": [asdict(result) for result in results],
        "submission": submission_us(layout, where, blocks=blocks, repeats=repeats, seed=seed),
        "steps": [asdict(row) for row in measure_steps(where, seed)],
        "churn": churn_rows(seed),
        "switches": [asdict(row) for row in measure_switches(seed)],
    }
    _show(report)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
