"""``llumnix bench migration``: what it costs to move a running request, by its length.

Two instances with a small random model, each with a batch of its own; one more request goes to and fro
between them. The same is done three times: live, live without the target's hold, and with a blocking copy
(the request stops first, then everything is copied). What each figure is and how it is taken stands in
migration_driver.py.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from llumnix.bench.machine import describe_machine
from llumnix.bench.migration_driver import Driver, Ear, Measured
from llumnix.bench.migration_pair import Heard, Pair, ThreadPair
from llumnix.core.config import ClusterConfig, Config, EngineConfig, MigrationConfig
from llumnix.core.errors import LlumnixError

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BATCH, BATCH_TOKENS = 4, 512
POOL_TOKENS = 24_576
MAX_MODEL_LEN = 10_240
BULK_BYTES = 1 << 20
LONG_RECOMPUTE = 2048

PairMaker = Callable[[Config, int, Heard], Pair]


def benchmark_config(device: str, transport: str) -> Config:
    """The setting of the live run; the others differ in their migration leaf alone."""
    engine = EngineConfig(
        model="random",
        device=device,
        dtype="bfloat16",
        kv_blocks=POOL_TOKENS // 16,
        max_model_len=MAX_MODEL_LEN,
        batch_max=16,
        threads=max(1, (os.cpu_count() or 1) // 2) if device == "cpu" else 0,
    )
    return Config(
        engine=engine, migration=MigrationConfig(transport=transport), cluster=ClusterConfig(instances=2)
    )


def run(
    config: Config, make_pair: PairMaker, *, lengths: tuple[int, ...], repeats: int, seed: int
) -> dict[str, Any]:
    """All of it. Returns what goes into the JSON file."""
    machine = describe_machine()
    live, extra = _live(config, make_pair, lengths, repeats, seed)
    unheld_config = replace(config, migration=replace(config.migration, hold_share=0.0))
    unheld = _moves(unheld_config, make_pair, lengths, repeats, seed)
    blocking_config = replace(unheld_config, migration=replace(unheld_config.migration, stages_max=0))
    blocking = _moves(blocking_config, make_pair, lengths, max(4, repeats // 4), seed)
    results, details = [], []
    for length in lengths:
        moved, copied = live[length], extra[length]
        downtimes = [move.downtime_s * 1e3 for move in moved.moves]
        step_ms = mean(moved.steps_s) * 1e3
        results.append(
            {
                "length": length,
                "downtime_ms_p50": _percentile(downtimes, 50),
                "downtime_ms_p99": _percentile(downtimes, 99),
                "blocking_ms_p50": _percentile([m.downtime_s * 1e3 for m in blocking[length].moves], 50),
                "recompute_ms_p50": _percentile([s * 1e3 for s in copied["recompute_s"]], 50),
                "stages": mean(move.stages for move in moved.moves),
                "decode_step_ms": step_ms,
                "decode_step_migrating_ms": mean(moved.steps_migrating_s) * 1e3,
                "kv_bytes": int(mean(move.kv_bytes for move in moved.moves)),
                "copy_gb_s": copied["copy_gb_s"],
                "memcpy_gb_s": copied["memcpy_gb_s"],
            }
        )
        shares = [move.downtime_s / move.ordinary_step_s for move in moved.moves]
        details.append(
            {
                "length": length,
                "migrations": len(moved.moves),
                "downtime_steps_p50": _percentile(shares, 50),
                "downtime_steps_p99": _percentile(shares, 99),
                "downtime_unheld_ms_p50": _percentile([m.downtime_s * 1e3 for m in unheld[length].moves], 50),
                "downtime_unheld_ms_p99": _percentile([m.downtime_s * 1e3 for m in unheld[length].moves], 99),
                "decode_step_ms_p50": _percentile([s * 1e3 for s in moved.steps_s], 50),
                "decode_step_migrating_ms_p50": _percentile([s * 1e3 for s in moved.steps_migrating_s], 50),
                "decode_step_migrating_unheld_ms": mean(unheld[length].steps_migrating_s) * 1e3,
                "decode_step_unheld_ms": mean(unheld[length].steps_s) * 1e3,
                "downtimes_ms": [round(downtime, 3) for downtime in downtimes],
                "migration_ms_p50": _percentile([m.duration_s * 1e3 for m in moved.moves], 50),
            }
        )
    return {
        "benchmark": "migration",
        "config": asdict(config),
        "seed": seed,
        "batch": {"requests": BATCH, "prompt_tokens": BATCH_TOKENS},
        "machine": machine,
        "results": results,
        "details": details,
    }


def _live(
    config: Config, make_pair: PairMaker, lengths: tuple[int, ...], repeats: int, seed: int
) -> tuple[dict[int, Measured], dict[int, dict[str, Any]]]:
    ear = Ear()
    pair = make_pair(config, seed, ear.heard)
    try:
        driver = Driver(pair, ear, batch=BATCH, batch_tokens=BATCH_TOKENS, seed=seed)
        measured, extra = {}, {}
        for length in lengths:
            copied: dict[str, Any] = {}

            def copy_speeds(copied: dict[str, Any] = copied) -> None:
                bulk = [s for name in pair.hellos for s in pair.reads(name) if s.kv_bytes >= BULK_BYTES]
                size = max((stats.kv_bytes for stats in bulk), default=BULK_BYTES)
                copied["copy_gb_s"] = _percentile([s.kv_bytes / s.duration_s / 1e9 for s in bulk], 50)
                copied["memcpy_gb_s"] = pair.memcpy_gb_s("a", size)

            measured[length] = driver.measure(length, repeats, copy_speeds)
            copied["recompute_s"] = driver.recompute_s(length, 3 if length <= LONG_RECOMPUTE else 1)
            extra[length] = copied
    finally:
        pair.close()
    return measured, extra


def _moves(
    config: Config, make_pair: PairMaker, lengths: tuple[int, ...], repeats: int, seed: int
) -> dict[int, Measured]:
    ear = Ear()
    pair = make_pair(config, seed, ear.heard)
    try:
        driver = Driver(pair, ear, batch=BATCH, batch_tokens=BATCH_TOKENS, seed=seed)
        return {length: driver.measure(length, repeats) for length in lengths}
    finally:
        pair.close()


def _percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else float("nan")


def _show(report: dict[str, Any]) -> None:
    names = list(report["results"][0])
    table = Table(title="live migration, times in ms")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in report["results"]:
        table.add_row(
            *(f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in names)
        )
    console = Console()
    console.print(table)
    for row in report["details"]:
        console.print(
            f"{row['length']}: downtime {row['downtime_steps_p50']:.3f} steps, "
            f"{row['downtime_unheld_ms_p50']:.2f} ms without the hold"
        )


def _parse_lengths(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers") from None
    if not all(16 <= length <= LENGTHS[-1] for length in lengths):
        raise click.BadParameter(f"lengths go from 16 to {LENGTHS[-1]}")
    return lengths


@click.command(name="migration")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="write the results to this file")
@click.option("--in-process", is_flag=True, help="both engines on threads of this process, no sockets")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--transport", type=click.Choice(["auto", "inprocess", "shm", "zmq"]), default="auto")
@click.option("--lengths", default=",".join(map(str, LENGTHS)), show_default=True, callback=_parse_lengths)
@click.option(
    "--repeats", type=click.IntRange(2), default=40, show_default=True, help="migrations per length"
)
@click.option("--seed", default=0, show_default=True)
def command(
    json_path: Path | None,
    in_process: bool,
    device: str,
    transport: str,
    lengths: tuple[int, ...],
    repeats: int,
    seed: int,
) -> None:
    """Downtime of live migration against a blocking copy and recompute, by sequence length."""
    make_pair: PairMaker
    if in_process:
        make_pair = ThreadPair
    else:
        from llumnix.bench.migration_processes import ProcessPair  # needs ZeroMQ, which --in-process does not

        make_pair = ProcessPair
    config = benchmark_config(device, transport)
    try:
        report = run(config, make_pair, lengths=lengths, repeats=repeats, seed=seed)
    except LlumnixError as error:
        raise click.ClickException(str(error)) from error
    _show(report)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
