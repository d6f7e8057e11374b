"""How fast the global scheduler decides, by number of instances: `llumnix bench scheduler`.

The scheduler runs as in the manager, in this process, without sockets: load reports and placements come in
mixed evenly, as under load, and a rescheduling round every 250 ms of virtual time, before which every
instance has reported a new load. A dispatch decision is one Place from its arrival to its answer; a report is
its bytes decoded and taken in; a round is one tick in which a round is due, orders and expiries included.
Loads are drawn with a fixed seed so that a part of the instances wants to give requests away in every round.
What the manager adds end to end is scheduler_end_to_end.py's.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from llumnix.bench.machine import describe_machine
from llumnix.bench.scheduler_end_to_end import EndToEnd
from llumnix.bench.scheduler_end_to_end import run as end_to_end
from llumnix.bench.scheduler_loads import REQUEST_KINDS, Loads, percentile
from llumnix.cli.output_paths import OUTPUT_FILE
from llumnix.control.global_scheduler import GlobalScheduler
from llumnix.core.codec import decode, encode
from llumnix.core.config import SchedulerConfig
from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import FrontendHello
from llumnix.runtime.garbage import SWEEP_S, Garbage

INSTANCES = (16, 64, 256, 1024, 4096)
THROUGH_INSTANCES = (16, 256, 1024)
ROUND_S = 0.25
FRONTEND = "tcp://frontend:1"
WARM_UP_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Result:
    """Decisions of one cluster size about ``requests`` of one kind (Loads.place); times as in the module.
    ``collection_ms`` is one garbage collection, made by the manager every SWEEP_S between messages."""

    instances: int
    requests: str
    dispatch_us_p50: float
    dispatch_us_p99: float
    decisions_per_s: float
    reports_per_s: float
    round_ms_p50: float
    round_ms_p99: float
    collection_ms: float


class Cluster(Loads):
    """Instances that only say what they are told to, and the scheduler they say it to."""

    def __init__(self, config: SchedulerConfig, instances: int, seed: int) -> None:
        super().__init__(seed)
        self.core = GlobalScheduler(config, "bench", "tcp://manager:1", 0.0)
        self.ids = [f"i{number}" for number in range(instances)]
        self.core.handle(FrontendHello("f", FRONTEND), 0.0)
        for instance_id in self.ids:
            self.core.handle(self.hello(instance_id, f"tcp://{instance_id}"), 0.0)
            self.core.handle(self.report(instance_id), 0.0)


def run(
    config: SchedulerConfig, instances: int, requests: str, *, decisions: int, rounds: int, seed: int
) -> Result:
    """Measure one cluster size with one kind of requests. Garbage collection is as in the manager: not
    meanwhile."""
    cluster = Cluster(config, instances, seed)
    core, turns = cluster.core, cluster.turns(cluster.ids)
    dispatch_ns: list[int] = []
    report_ns: list[int] = []
    round_ns: list[int] = []
    now, number = 0.0, 0
    garbage = Garbage(now)
    placements = max(1, decisions // rounds)
    per_round = max(placements, instances)
    for _ in range(rounds):
        for turn in range(per_round):
            data = encode(cluster.report(next(turns)))
            begun = perf_counter_ns()
            core.handle(decode(data), now)
            report_ns.append(perf_counter_ns() - begun)
            if turn * placements % per_round >= placements:
                continue
            number += 1
            place = cluster.place(requests, f"r{number}", FRONTEND, cluster.ids)
            begun = perf_counter_ns()
            answer = core.handle(place, now)[-1]
            dispatch_ns.append(perf_counter_ns() - begun)
            cluster.placed(answer.message.instance_id, place.request_id)  # type: ignore[union-attr]
        now += ROUND_S
        begun = perf_counter_ns()
        core.tick(now)
        round_ns.append(perf_counter_ns() - begun)
    begun = perf_counter_ns()
    garbage.sweep(now + SWEEP_S)
    collection_ns = perf_counter_ns() - begun
    garbage.close()
    dispatch, reports, ticks = (_warm(series) for series in (dispatch_ns, report_ns, round_ns))
    return Result(
        instances=instances,
        requests=requests,
        dispatch_us_p50=percentile(dispatch, 50) / 1e3,
        dispatch_us_p99=percentile(dispatch, 99) / 1e3,
        decisions_per_s=1e9 * len(dispatch) / sum(dispatch),
        reports_per_s=1e9 * len(reports) / sum(reports),
        round_ms_p50=percentile(ticks, 50) / 1e6,
        round_ms_p99=percentile(ticks, 99) / 1e6,
        collection_ms=collection_ns / 1e6,
    )


def _warm(series: list[int]) -> list[float]:
    return [float(value) for value in series][int(len(series) * WARM_UP_SHARE) :]


def _show(results: list[Result]) -> None:
    titles = ("instances", "requests", "µs p50", "p99", "decisions/s", "reports/s", "round ms p50", "p99")
    table = Table(*titles, box=box.SIMPLE)
    for row in results:
        table.add_row(
            str(row.instances),
            row.requests,
            f"{row.dispatch_us_p50:.1f}",
            f"{row.dispatch_us_p99:.1f}",
            f"{row.decisions_per_s:.0f}",
            f"{row.reports_per_s:.0f}",
            f"{row.round_ms_p50:.2f}",
            f"{row.round_ms_p99:.2f}",
        )
    Console().print(table)


def _show_end_to_end(rows: list[EndToEnd]) -> None:
    table = Table("instances", "requests/s", "answered", "TTFT direct p50", "p99 ms", "added p50", "p99 ms")
    for row in rows:
        table.add_row(
            str(row.instances),
            f"{row.requests_per_s:.0f}",
            f"{row.answered}/{row.asked}",
            f"{row.direct_ttft_ms_p50:.2f}",
            f"{row.direct_ttft_ms_p99:.2f}",
            f"{row.added_ttft_ms_p50:.2f}",
            f"{row.added_ttft_ms_p99:.2f}",
        )
    Console().print(table)


@click.command(name="scheduler")
@click.option("--json", "json_path", type=OUTPUT_FILE, help="Write the results to this file.")
@click.option(
    "--instances", type=click.IntRange(1, 10_000), multiple=True, help="Only this many; repeatable."
)
@click.option("--decisions", type=click.IntRange(100), default=20_000, show_default=True, help="Per size.")
@click.option("--rounds", type=click.IntRange(10), default=100, show_default=True, help="Per size.")
@click.option("--rate", type=click.FloatRange(1), default=200.0, show_default=True, help="End to end, per s.")
@click.option(
    "--seconds", type=click.FloatRange(0), default=5.0, show_default=True, help="End to end; 0: without."
)
@click.option(
    "--dispatch-policy", default=SchedulerConfig().dispatch_policy, show_default=True, help="Or module:Class."
)
@click.option("--seed", default=0, show_default=True, help="Of the loads.")
def command(
    json_path: Path | None,
    instances: tuple[int, ...],
    decisions: int,
    rounds: int,
    rate: float,
    seconds: float,
    dispatch_policy: str,
    seed: int,
) -> None:
    """Time per decision of the global scheduler, by number of instances, and what it adds to a request's time
    to first token in processes of their own."""
    config = replace(SchedulerConfig(), dispatch_policy=dispatch_policy)
    machine = describe_machine()
    try:
        results = [
            run(config, count, kind, decisions=decisions, rounds=rounds, seed=seed)
            for kind in REQUEST_KINDS
            for count in instances or INSTANCES
        ]
        _show(results)
        through: list[EndToEnd] = [
            end_to_end(config, count, rate=rate, seconds=seconds, seed=seed)
            for count in instances or THROUGH_INSTANCES
            if seconds
        ]
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from error
    if through:
        _show_end_to_end(through)
    report: dict[str, Any] = {
        "config": {
            **asdict(config),
            "decisions": decisions,
            "rounds": rounds,
            "seed": seed,
            "seconds": seconds,
        },
        "machine": machine,
        "results": [asdict(row) for row in results],
        "end_to_end": [asdict(row) for row in through],
    }
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
