"""``llumnix bench vllm_serving``: vLLM's own serving benchmark client against a cluster over two vLLM
instances, migration off and on.

One cluster whose KV pools are small enough that an instance fills while the other has room: bursts of
requests whose lengths differ much. The same requests are sent in both modes, which alternate; the pairing
policy is changed while the cluster runs. What the client reports is kept as it is, with the cluster's own
counts of preemptions and migrations beside it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from llumnix.bench.live import DISPATCH_ONLY, MIGRATING, Mode
from llumnix.bench.live_load import RealCluster, real_cluster
from llumnix.bench.machine import OthersCpu, describe_machine, warn_of_others
from llumnix.cli.output_paths import OUTPUT_FILE
from llumnix.core.config import ClusterConfig, Config, EngineConfig, FrontendConfig
from llumnix.core.errors import LlumnixError
from llumnix.instance.model_loader import resolve_model

CLIENT_TIMEOUT_S = 240.0  # beyond the time in which it sends its requests
MODES = (DISPATCH_ONLY, MIGRATING)
LATENCIES = tuple(f"{point}_{name}_ms" for name in ("ttft", "tpot", "itl") for point in ("median", "p99"))
FIGURES = (*LATENCIES, "output_throughput", "request_throughput", "completed", "failed")
"""Of what the client reports. Latencies in ms, throughput per second."""
REASON_LINES = 5


def settings() -> Config:
    """Two instances of SmolLM2 with a thread and little KV each."""
    return Config(
        engine=EngineConfig(
            kind="vllm",
            model="smollm2",
            dtype="bfloat16",
            threads=1,
            max_model_len=1024,
            kv_blocks=160,
            staging_gib=0.1,
            engine_args="block_size=32;enforce_eager=true",
        ),
        frontend=FrontendConfig(port=0),
        cluster=ClusterConfig(instances=2),
    )


def run(requests: int, rate: float, repeats: int, seed: int) -> dict[str, Any]:
    """All of it. Returns what goes into the JSON file. Raises LlumnixError if the client fails."""
    config = settings()
    machine = describe_machine()
    runs: list[dict[str, Any]] = []
    with real_cluster(config) as cluster:
        _client(cluster, config, 4, 4.0, seed)  # first steps are slow, connections are made
        others = OthersCpu()
        for number in range(repeats):
            for mode in MODES[:: -1 if number % 2 else 1]:
                runs.append(_run_once(cluster, config, mode, (requests, rate, seed + 1 + number)))
        others_cpu = others.share()
    return {
        "benchmark": "vllm_serving",
        "machine": machine,
        "seed": seed,
        "others_cpu": others_cpu,
        "load": {"requests": requests, "rate": rate, "options": client_options(requests, rate)},
        "config": {name: asdict(getattr(config, name)) for name in ("engine", "cluster")},
        "results": [_row(mode, [one for one in runs if one["mode"] == mode.name]) for mode in MODES],
        "runs": runs,
    }


def client_options(requests: int, rate: float) -> list[str]:
    """The client's options that make the workload: Gamma arrivals four times as irregular as Poisson's,
    prompts and answers of 20 to 380 tokens."""
    return [
        *("--dataset-name", "random", "--random-input-len", "200", "--random-output-len", "200"),
        *("--random-range-ratio", "0.9", "--ignore-eos", "--temperature", "0"),
        *("--num-prompts", str(requests), "--request-rate", str(rate), "--burstiness", "0.25"),
        *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "99", "--disable-tqdm"),
        *("--model", "smollm2"),
    ]


def _run_once(
    cluster: RealCluster, config: Config, mode: Mode, load: tuple[int, float, int]
) -> dict[str, Any]:
    cluster.order("policy", {"kind": "pairing", "name": mode.pairing, "settings": {}})
    before = cluster.counted()
    reported = _client(cluster, config, *load)
    counts = {name: now - before[name] for name, now in cluster.counted().items()}
    return {"mode": mode.name, **{name: reported[name] for name in FIGURES}, **counts}


def _client(cluster: RealCluster, config: Config, requests: int, rate: float, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="llumnix-bench-") as folder:
        command = [
            *(sys.executable, "-m", "llumnix.bench.vllm_client", "--base-url", cluster.url),
            *client_options(requests, rate),
            *("--tokenizer", str(resolve_model(config.engine.model)), "--seed", str(seed)),
            *("--save-result", "--result-dir", folder, "--result-filename", "result.json"),
        ]
        timeout_s = requests / rate + CLIENT_TIMEOUT_S
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise LlumnixError(f"vLLM's client did not finish within {timeout_s:.0f} s") from None
        result = Path(folder, "result.json")
        if done.returncode != 0 or not result.exists():
            last = (done.stderr or done.stdout).strip().splitlines()[-REASON_LINES:]
            raise LlumnixError("vLLM's client failed:\n" + "\n".join(last))
        reported: dict[str, Any] = json.loads(result.read_text())
    return reported


def _row(mode: Mode, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over a mode's runs; counts are sums."""
    counted = ("completed", "failed", "preemptions", "migrations")
    figures = {name: median(run[name] for run in runs) for name in FIGURES if name not in counted}
    return {"mode": mode.name, **figures, **{name: sum(run[name] for run in runs) for name in counted}}


def _show(report: dict[str, Any]) -> None:
    names = ("ttft", "tpot", "itl")
    table = Table(title="vLLM's client, two vLLM instances; times in ms")
    for title in ("", *(f"{name.upper()} {point}" for name in names for point in ("P50", "P99"))):
        table.add_column(title, justify="right")
    for title in ("tokens/s", "preempted", "moved"):
        table.add_column(title, justify="right")
    for row in report["results"]:
        times = (f"{row[f'{point}_{name}_ms']:.0f}" for name in names for point in ("median", "p99"))
        counts = (str(row["preemptions"]), str(row["migrations"]))
        table.add_row(row["mode"], *times, f"{row['output_throughput']:.0f}", *counts)
    Console().print(table)
    warn_of_others(report["others_cpu"])


@click.command("vllm_serving")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Write results there.")
@click.option("--requests", type=click.IntRange(min=10), default=60, show_default=True)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=2.5, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def command(json_file: Path | None, requests: int, rate: float, repeats: int, seed: int) -> None:
    """vLLM's serving benchmark client against two vLLM instances, migration off and on. Needs vLLM."""
    try:
        report = run(requests, rate, repeats, seed)
    except LlumnixError as error:
        raise click.ClickException(str(error)) from error
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _show(report)
