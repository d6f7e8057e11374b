"""``llumnix bench migration --swapped``: what KV in host memory is worth to a request that moves.

Two instances with a batch each. At the source, whose batch is more urgent, one more request is displaced
again and again, then moved to the target, which has one place left. Once it was swapped out and takes its KV
along; once its KV was dropped, and the target computes it anew. Measured is the time from the order to the
first token from the target, as the client's side hears it.
"""

from dataclasses import asdict, replace
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from llumnix.bench.machine import OthersCpu, describe_machine, warn_of_others
from llumnix.bench.migration_driver import BATCH, BATCH_TOKENS, Arrived, Driver, Ear
from llumnix.bench.migration_pair import PairMaker
from llumnix.core.config import Config, SwapConfig

HOST_TOKENS = 24_576
WITH_KV, ANEW = "swap", "recompute"
TOGETHER_MAX = 8  # before those that stay have said all they may


def run(
    config: Config, make_pair: PairMaker, *, lengths: tuple[int, ...], repeats: int, seed: int
) -> dict[str, Any]:
    """All of it. Returns what goes into the JSON file. Raises BenchmarkFailed."""
    machine, others = describe_machine(), OthersCpu()
    config = replace(
        config,
        engine=replace(config.engine, batch_max=BATCH + 1),
        swap=SwapConfig(
            host_blocks=HOST_TOKENS // config.engine.block_size,
            swap_ahead=False,
            swap_reuse=False,
            rerank_frequency=1.0,
        ),
    )
    arrived = {way: _measure(config, make_pair, way, lengths, repeats, seed) for way in (WITH_KV, ANEW)}
    return {
        "benchmark": "migration-swapped",
        "config": asdict(config),
        "seed": seed,
        "batch": {"requests": BATCH, "prompt_tokens": BATCH_TOKENS},
        "machine": machine,
        "others_cpu_share": others.share(),
        "results": [_row(length, arrived[WITH_KV][length], arrived[ANEW][length]) for length in lengths],
    }


def _measure(
    config: Config, make_pair: PairMaker, way: str, lengths: tuple[int, ...], repeats: int, seed: int
) -> dict[int, list[Arrived]]:
    ear = Ear()
    config = replace(config, scheduler=replace(config.scheduler, preemption_policy=way))
    pair = make_pair(config, seed, ear.heard)
    try:
        driver = Driver(pair, ear, batch=BATCH, batch_tokens=BATCH_TOKENS, seed=seed)
        return {
            length: [
                one
                for first in range(0, repeats, TOGETHER_MAX)
                for one in driver.arrivals(length, min(TOGETHER_MAX, repeats - first))
            ]
            for length in lengths
        }
    finally:
        pair.close()


def _row(length: int, with_kv: list[Arrived], anew: list[Arrived]) -> dict[str, Any]:
    """``with_kv_moves``: how many took KV along; the source leaves it if copying seems to take longer."""
    ms = [[one.first_token_s * 1e3 for one in moves] for moves in (with_kv, anew)]
    return {
        "length": length,
        "first_token_with_kv_ms_p50": median(ms[0]),
        "first_token_anew_ms_p50": median(ms[1]),
        "ratio": median(ms[1]) / median(ms[0]),
        "migration_with_kv_ms_p50": median(one.duration_s * 1e3 for one in with_kv),
        "kv_bytes": int(median(one.kv_bytes for one in with_kv)),
        "moves": len(with_kv),
        "with_kv_moves": sum(one.kv_bytes > 0 for one in with_kv),
        "kv_bytes_anew": max(one.kv_bytes for one in anew),
        "with_kv_ms": [round(value, 2) for value in ms[0]],
        "anew_ms": [round(value, 2) for value in ms[1]],
    }


def show(report: dict[str, Any]) -> None:
    """A table of it."""
    table = Table(title="order to first token at the target, p50 in ms")
    for name in ("length", "with its KV", "computed anew", "ratio", "took KV along"):
        table.add_column(name, justify="right")
    for row in report["results"]:
        times = [f"{row[f'first_token_{way}_ms_p50']:.1f}" for way in ("with_kv", "anew")]
        share = f"{row['with_kv_moves']} of {row['moves']}"
        table.add_row(str(row["length"]), *times, f"{row['ratio']:.1f}", share)
    Console().print(table)
    warn_of_others(report["others_cpu_share"])
