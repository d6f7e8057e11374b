"""``llumnix bench migration``: what it costs to move a running request, by its length.

Two instances with a small random model, each with a batch of its own; one more request goes to and fro
between them. The same is done three times: live, live with copies at full speed (``copy_share`` 1), and with
a blocking copy (the request stops first, then everything is copied). What each figure is and how it is taken
stands in migration_driver.py and migration_steps.py.
"""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from llumnix.bench import migration_swapped
from llumnix.bench.machine import OthersCpu, describe_machine, warn_of_others
from llumnix.bench.migration_driver import BATCH, BATCH_TOKENS, Driver, Ear, Moved
from llumnix.bench.migration_pair import PairMaker, ThreadPair
from llumnix.bench.migration_steps import Steps
from llumnix.cli.output_paths import OUTPUT_FILE
from llumnix.core.config import ClusterConfig, Config, EngineConfig, MigrationConfig, SwapConfig
from llumnix.core.errors import LlumnixError
from llumnix.migration.transports.base import ReadStats

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
POOL_TOKENS = 24_576
MAX_MODEL_LEN = 10_240
BULK_BYTES = 1 << 20
LONG_RECOMPUTE = 2048

VLLM_ARGS = "load_format=dummy;enforce_eager=true;enable_prefix_caching=false"
"""Made-up weights, a quick start; and what went away and comes back must be copied again."""


def benchmark_config(device: str, transport: str, kind: str = "torch") -> Config:
    """The setting of the live run; the others differ in their migration leaf alone."""
    engine = EngineConfig(
        kind=kind,
        engine_args=VLLM_ARGS if kind == "vllm" else "",
        model="random",
        device=device,
        dtype="bfloat16",
        kv_blocks=POOL_TOKENS // 16,
        max_model_len=MAX_MODEL_LEN,
        batch_max=16,
        threads=max(1, (os.cpu_count() or 1) // 2) if device == "cpu" else 0,
    )
    return Config(
        engine=engine,
        swap=SwapConfig(host_share=0.0),
        migration=MigrationConfig(transport=transport),
        cluster=ClusterConfig(instances=2),
    )


def run(
    config: Config, make_pair: PairMaker, *, lengths: tuple[int, ...], repeats: int, seed: int
) -> dict[str, Any]:
    """All of it. Returns what goes into the JSON file."""
    machine, others = describe_machine(), OthersCpu()
    few = max(2, repeats // 4)
    live = _measure(config, make_pair, lengths, repeats, seed, recompute=True)
    full_speed_config = replace(config, migration=replace(config.migration, copy_share=1.0))
    full_speed = _measure(full_speed_config, make_pair, lengths, few, seed)
    blocking_config = replace(config, migration=replace(config.migration, hold_share=0.0, stages_max=0))
    blocking = _measure(blocking_config, make_pair, lengths, few, seed)
    results, details = [], []
    for length in lengths:
        measured = live[length]
        results.append(_result(length, measured, blocking[length]))
        details.append(_detail(length, measured, full_speed[length]))
    return {
        "benchmark": "migration",
        "config": asdict(config),
        "seed": seed,
        "batch": {"requests": BATCH, "prompt_tokens": BATCH_TOKENS},
        "machine": machine,
        "others_cpu_share": others.share(),
        "results": results,
        "details": details,
    }


@dataclass(slots=True)
class _Measured:
    """One length in one setting. ``copies``: pre-copies alone, not the last blocks."""

    moves: list[Moved]
    copies: list[ReadStats]
    memcpy_gb_s: float
    recompute_s: list[float] = field(default_factory=list)

    def downtimes_ms(self) -> list[float]:
        return [move.downtime_s * 1e3 for move in self.moves]

    def steps(self) -> list[Steps]:
        return [move.steps for move in self.moves if move.steps is not None]

    def slowdown(self) -> float:
        """Of all steps together, while migrating against before."""
        return sum(s.migrating_s for s in self.steps()) / sum(s.ordinary_s for s in self.steps()) - 1.0


def _result(length: int, live: _Measured, blocking: _Measured) -> dict[str, Any]:
    steps, downtimes = live.steps(), live.downtimes_ms()
    step_ms = sum(s.ordinary_s for s in steps) / sum(s.count for s in steps) * 1e3
    return {
        "length": length,
        "downtime_ms_p50": _percentile(downtimes, 50),
        "downtime_ms_p99": _percentile(downtimes, 99),
        "blocking_ms_p50": _percentile(blocking.downtimes_ms(), 50),
        "recompute_ms_p50": _percentile([s * 1e3 for s in live.recompute_s], 50),
        "stages": mean(move.stages for move in live.moves),
        "decode_step_ms": step_ms,
        "decode_step_migrating_ms": step_ms * (1.0 + live.slowdown()),
        "kv_bytes": int(mean(move.kv_bytes for move in live.moves)),
        "copy_gb_s": _percentile([c.kv_bytes / c.copying_s / 1e9 for c in live.copies], 50),
        "memcpy_gb_s": live.memcpy_gb_s,
    }


def _detail(length: int, live: _Measured, full_speed: _Measured) -> dict[str, Any]:
    """What a reading of the results needs: shares, spread, and the same at full speed."""
    shares = [move.downtime_s / move.ordinary_step_s for move in live.moves]
    slowdowns = [steps.slowdown for steps in live.steps()]
    return {
        "length": length,
        "migrations": len(live.moves),
        "downtime_steps_p50": _percentile(shares, 50),
        "downtime_steps_p99": _percentile(shares, 99),
        "downtimes_ms": [round(downtime, 3) for downtime in live.downtimes_ms()],
        "migration_ms_p50": _percentile([move.duration_s * 1e3 for move in live.moves], 50),
        "steps_compared": sum(steps.count for steps in live.steps()),
        "slowdown": live.slowdown(),
        "slowdown_p50": _percentile(slowdowns, 50),
        "slowdown_standard_error": stdev(slowdowns) / len(slowdowns) ** 0.5,
        "slowdown_control_p50": _percentile([steps.control for steps in live.steps()], 50),
        "held_ms_mean": mean(steps.held_s for steps in live.steps()) * 1e3,
        "copy_and_rests_gb_s": _percentile([c.kv_bytes / c.duration_s / 1e9 for c in live.copies], 50),
        "copies_p50": _percentile([c.copies for c in live.copies], 50),
        "full_speed_copy_gb_s": _percentile([c.kv_bytes / c.duration_s / 1e9 for c in full_speed.copies], 50),
        "full_speed_slowdown": full_speed.slowdown(),
        "full_speed_downtime_ms_p50": _percentile(full_speed.downtimes_ms(), 50),
        "full_speed_migration_ms_p50": _percentile([m.duration_s * 1e3 for m in full_speed.moves], 50),
    }


def _measure(
    config: Config,
    make_pair: PairMaker,
    lengths: tuple[int, ...],
    repeats: int,
    seed: int,
    *,
    recompute: bool = False,
) -> dict[int, _Measured]:
    ear = Ear()
    pair = make_pair(config, seed, ear.heard)
    try:
        driver = Driver(pair, ear, batch=BATCH, batch_tokens=BATCH_TOKENS, seed=seed)
        measured = {}
        for length in lengths:
            one = measured[length] = _Measured([], [], 0.0)

            def copy_speeds(one: _Measured = one) -> None:
                reads = [stats for name in pair.hellos for stats in pair.reads(name)]
                one.copies = [stats for stats in reads if stats.kv_bytes >= BULK_BYTES]
                size = max((stats.kv_bytes for stats in one.copies), default=BULK_BYTES)
                one.memcpy_gb_s = pair.memcpy_gb_s("a", size)

            one.moves = driver.measure(length, repeats, copy_speeds)
            if recompute:
                one.recompute_s = driver.recompute_s(length, 3 if length <= LONG_RECOMPUTE else 1)
    finally:
        pair.close()
    return measured


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
            f"{row['length']}: downtime {row['downtime_steps_p50']:.3f} steps; steps "
            f"{row['slowdown']:+.1%} ± {row['slowdown_standard_error']:.1%} (control "
            f"{row['slowdown_control_p50']:+.1%}), held {row['held_ms_mean']:.2f} ms; at full speed "
            f"{row['full_speed_copy_gb_s']:.1f} GB/s, steps {row['full_speed_slowdown']:+.1%}"
        )
    warn_of_others(report["others_cpu_share"])


def _parse_lengths(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers") from None
    if not all(16 <= length <= LENGTHS[-1] for length in lengths):
        raise click.BadParameter(f"lengths go from 16 to {LENGTHS[-1]}")
    return lengths


@click.command(name="migration")
@click.option("--json", "json_path", type=OUTPUT_FILE, help="write the results to this file")
@click.option("--in-process", is_flag=True, help="both engines on threads of this process, no sockets")
@click.option("--engine", "kind", type=click.Choice(["torch", "vllm"]), default="torch", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--transport", type=click.Choice(["auto", "inprocess", "shm", "zmq"]), default="auto")
@click.option("--lengths", default=",".join(map(str, LENGTHS)), show_default=True, callback=_parse_lengths)
@click.option(
    "--repeats", type=click.IntRange(2), default=24, show_default=True, help="migrations per length"
)
@click.option("--seed", default=0, show_default=True)
@click.option("--swapped", is_flag=True, help="move requests that are swapped out, with KV and without")
def command(
    json_path: Path | None,
    in_process: bool,
    kind: str,
    device: str,
    transport: str,
    lengths: tuple[int, ...],
    repeats: int,
    seed: int,
    swapped: bool,
) -> None:
    """Downtime of live migration against a blocking copy and recompute, by sequence length."""
    if swapped and kind == "vllm":
        raise click.UsageError("--swapped needs host memory, which vLLM engines have none of")
    make_pair: PairMaker
    if in_process:
        if kind == "vllm":
            raise click.UsageError("vLLM allows one engine per process: leave out --in-process")
        make_pair = ThreadPair
    else:
        from llumnix.bench.migration_processes import ProcessPair  # needs ZeroMQ, which --in-process does not

        make_pair = ProcessPair
    config = benchmark_config(device, transport, kind)
    try:
        if swapped:
            report = migration_swapped.run(config, make_pair, lengths=lengths, repeats=repeats, seed=seed)
            migration_swapped.show(report)
            _write(json_path, report)
            return
        report = run(config, make_pair, lengths=lengths, repeats=repeats, seed=seed)
    except LlumnixError as error:
        raise click.ClickException(str(error)) from error
    _show(report)
    _write(json_path, report)


def _write(json_path: Path | None, report: dict[str, Any]) -> None:
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
