"""How long the simulator takes and how much memory: `llumnix bench simulator`.

One run of the paper's cluster under the policies of serve (freeness, migration on) with M-M requests:
its 16 instances and 10,000 requests, or with ``--instances 1000 --rate 475 --requests 1000000`` a cluster
a hundred times as busy. The run is that of ``llumnix simulate osdi24-serving``, in this process, one core.
"""

import json
import resource
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, process_time

import click

from llumnix.bench.machine import describe_machine
from llumnix.cli.output_paths import OUTPUT_FILE
from llumnix.sim.cost import LLAMA_7B_A10
from llumnix.sim.presets import PAPER_CONFIG, Case, with_policy
from llumnix.sim.runs import run_case
from llumnix.sim.workload import Synthetic

LENGTHS = "M-M"
POLICY = "llumnix"
RATE_PER_INSTANCE = 7.6 / 16  # the middle one of the paper's rates for M-M


@dataclass(frozen=True, slots=True)
class Result:
    """``wall_s`` and ``cpu_s`` of the run alone; ``peak_rss_mib`` of the whole process."""

    instances: int
    requests: int
    rate: float
    virtual_s: float
    tokens: int
    finished: int
    migrations: int
    wall_s: float
    cpu_s: float
    peak_rss_mib: float
    requests_per_cpu_s: float


def measure(instances: int, requests: int, rate: float, seed: int) -> Result:
    """Simulate once."""
    paper = with_policy(PAPER_CONFIG, POLICY)
    config = replace(paper, cluster=replace(paper.cluster, instances=instances))
    case = Case(POLICY, config, LLAMA_7B_A10, Synthetic(LENGTHS, rate, requests, seed), seed)
    wall, cpu = perf_counter(), process_time()
    summary = run_case(case).summary
    wall_s, cpu_s = perf_counter() - wall, process_time() - cpu
    return Result(
        instances=instances,
        requests=requests,
        rate=rate,
        virtual_s=summary["virtual_s"],
        tokens=summary["tokens"],
        finished=summary["finished"],
        migrations=summary["migrations"],
        wall_s=round(wall_s, 2),
        cpu_s=round(cpu_s, 2),
        peak_rss_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        requests_per_cpu_s=round(requests / cpu_s, 1),
    )


@click.command("simulator")
@click.option("--instances", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--requests", type=click.IntRange(min=1), default=10_000, show_default=True)
@click.option("--rate", type=float, default=None, help="Requests per second; the paper's per instance.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--json", "json_path", type=OUTPUT_FILE, help="Result file.")
def command(instances: int, requests: int, rate: float | None, seed: int, json_path: Path | None) -> None:
    """Time and memory that a simulation takes."""
    machine = describe_machine()
    result = measure(instances, requests, RATE_PER_INSTANCE * instances if rate is None else rate, seed)
    for name, value in asdict(result).items():
        click.echo(f"{name:<20} {value:g}")
    if json_path is not None:
        content = {"machine": machine, "lengths": LENGTHS, "policy": POLICY, "seed": seed}
        text = json.dumps({**content, "results": [asdict(result)]}, indent=1)
        json_path.write_text(text + "\n", encoding="utf-8")
