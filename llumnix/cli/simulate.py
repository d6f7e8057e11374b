"""``llumnix simulate``: a cluster in virtual time, by preset or by options; table, JSON, plots, HTML."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from llumnix.cli.config_flags import config_options, resolve
from llumnix.cli.output_paths import OUTPUT_FILE, OUTPUT_FOLDER
from llumnix.core.config import Config
from llumnix.core.config_source import Value
from llumnix.core.errors import ConfigurationError

if TYPE_CHECKING:
    from llumnix.sim.presets import Case

PRESETS = ("osdi24-serving", "osdi24-priorities", "osdi24-autoscaling", "faults")
REQUESTS, PRESET_REQUESTS, STORIES = 1000, 10_000, 200
_MIXED = frozenset({"high_share", "tenants", "turns", "think_s"})
OF_OPTIONS = _MIXED | {"trace", "cost_model"}
"""What presets have of their own."""
OF_SYNTHETIC = _MIXED | {"traces", "rates", "cv"}
"""What a trace file says instead."""
OF_FAULTS = frozenset({"preset", "seed", "seeds", "jobs"})


@click.command("simulate")
@click.argument("preset", type=click.Choice(PRESETS), required=False)
@click.option(
    "--lengths", "traces", multiple=True, help="S-S … L-L, sharegpt, burstgpt or IN:OUT; repeatable."
)
@click.option("--rate", "rates", type=float, multiple=True, help="Requests per second; repeatable.")
@click.option(
    "--cv", type=float, default=None, help="Burstiness of arrivals; 1 is Poisson [1; presets their own]."
)
@click.option("--requests", type=int, default=None, help=f"How many [{REQUESTS}; presets {PRESET_REQUESTS}].")
@click.option(
    "--trace", type=click.Path(path_type=Path), help="Arrivals from a file: Azure CSV, Mooncake JSONL."
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    help="Side by side: a name, or DISPATCH/PAIRING, each built in or module:Class; repeatable.",
)
@click.option("--high-share", type=float, default=0.0, show_default=True, help="Share of high priority.")
@click.option(
    "--tenant", "tenants", multiple=True, metavar="NAME=WEIGHT", help="Share of requests; repeatable."
)
@click.option("--turns", type=float, default=1.0, show_default=True, help="Mean turns of a conversation.")
@click.option("--think", "think_s", type=float, default=10.0, show_default=True, help="Mean pause, seconds.")
@click.option(
    "--cost-model", default="llama-7b-a10", show_default=True, help="Preset, FILE.json, MODEL@DEVICE."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=None,
    help=f"So many from --seed on; the table has their means [1; faults {STORIES}].",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Write results there.")
@click.option("--plots", type=OUTPUT_FOLDER, help="Write PNG plots there.")
@click.option("--html", type=OUTPUT_FILE, help="Write a report there.")
@config_options
def command(
    preset: str | None,
    json_file: Path | None,
    plots: Path | None,
    html: Path | None,
    config_file: Path | None,
    jobs: int,
    **given: Any,
) -> None:
    """Run a cluster in virtual time and show what its clients would see.

    PRESET reruns a published experiment; faults runs --seeds small clusters in which much goes wrong, from
    --seed on, and checks every promise. Without one, options describe the workload. Settings of the
    scheduler, engines and so on are those of serve."""
    from llumnix.cli.simulate_output import (
        refuse_overruled,
        show,
        show_priorities,
        show_savings,
        write_json,
    )
    from llumnix.sim.runs import over_seeds, run_cases

    _refuse_unused(click.get_current_context(), preset, given["trace"])
    if preset == "faults":
        _tell_stories(given["seed"], given["seeds"] or STORIES, jobs)
        return
    own = {name: given.pop(name) for name in tuple(given) if "__" not in name}
    seeds = own["seeds"] or 1
    cases = [
        case
        for seed in range(own["seed"], own["seed"] + seeds)
        for case in _cases(preset, {**own, "seed": seed}, config_file, given)
    ]
    results = _with_progress(cases, lambda progress: run_cases(cases, jobs, progress))
    rows = over_seeds(results, seeds)
    show(rows)
    saved = show_savings(results) if preset == "osdi24-autoscaling" else []
    if preset == "osdi24-priorities":
        show_priorities(rows)
    if json_file is not None:
        write_json(json_file, preset, own, results, rows if seeds > 1 else [], saved)
    if plots is not None or html is not None:
        from llumnix.sim.plots import write_html, write_plots

        if plots is not None:
            write_plots(results, plots)
        if html is not None:
            write_html(results, html)
    refuse_overruled(results)


def _refuse_unused(context: click.Context, preset: str | None, trace: Path | None) -> None:
    """An option that would be ignored is a mistake: raises UsageError with its name."""
    given = [
        option
        for option in context.command.params
        if option.name and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]
    if preset == "faults":
        unused = [option for option in given if option.name not in OF_FAULTS]
    else:
        ignored = OF_OPTIONS if preset else OF_SYNTHETIC if trace is not None else frozenset[str]()
        unused = [option for option in given if option.name in ignored]
    if unused:
        what = preset or "--trace"
        raise click.UsageError(f"{unused[0].opts[0]} has no meaning with {what}", context)


def _tell_stories(first: int, count: int, jobs: int) -> None:
    """Run stories of faults; the first that ends badly is reported with the command that replays it."""
    from llumnix.cli.simulate_output import show_stories
    from llumnix.sim.faults import Story, run_seeds

    stories: list[Story] = []
    try:
        for story in run_seeds(range(first, first + count), jobs):
            stories.append(story)  # one by one, so that their number says which one failed
    finally:
        if len(stories) < count:
            seed = first + len(stories)
            click.echo(f"replay with: llumnix simulate faults --seed {seed} --seeds 1", err=True)
    show_stories(stories)


def _cases(
    preset: str | None, own: dict[str, Any], config_file: Path | None, given: dict[str, Value | None]
) -> "list[Case]":
    from llumnix.sim import presets

    if preset is None:
        return _generic(own, resolve(config_file, given, presets.GENERIC_CONFIG))
    config = resolve(config_file, given, presets.PAPER_CONFIG)
    count, seed = PRESET_REQUESTS if own["requests"] is None else own["requests"], own["seed"]
    make = {
        "osdi24-serving": presets.serving,
        "osdi24-priorities": presets.priorities,
        "osdi24-autoscaling": presets.autoscaling,
    }[preset]
    cvs = () if own["cv"] is None else (own["cv"],)
    return make(own["traces"], own["rates"], own["policies"], count=count, seed=seed, config=config, cvs=cvs)


def _generic(own: dict[str, Any], config: Config) -> "list[Case]":
    from llumnix.sim.presets import Case, with_policy
    from llumnix.sim.roofline import cost_model
    from llumnix.sim.traces import read_trace
    from llumnix.sim.workload import Conversations, Mix, Synthetic, Workload

    cost = cost_model(own["cost_model"])
    workloads: list[Workload] = []
    if own["trace"] is not None:
        workloads.append(read_trace(own["trace"], cost.max_model_len, own["requests"]))
    else:
        mix = Mix(own["high_share"], 1, tuple(_tenant(text) for text in own["tenants"]))
        talk = Conversations(own["turns"], own["think_s"]) if own["turns"] != 1 else None
        workloads += [
            Synthetic(
                lengths=lengths,
                rate=rate,
                count=REQUESTS if own["requests"] is None else own["requests"],
                seed=own["seed"],
                cv=1.0 if own["cv"] is None else own["cv"],
                tokens_max=cost.max_model_len,
                mix=mix,
                conversations=talk,
            )
            for lengths in own["traces"] or ("M-M",)
            for rate in own["rates"] or (1.0,)
        ]
    named = own["policies"] or (f"{config.scheduler.dispatch_policy}/{config.scheduler.pairing_policy}",)
    return [
        Case(policy, with_policy(config, policy), cost, workload, own["seed"])
        for workload in workloads
        for policy in named
    ]


def _tenant(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    try:
        return name, float(weight or 1)
    except ValueError:
        raise ConfigurationError(f"--tenant {text}: the weight must be a number") from None


def _with_progress(cases: "Sequence[Case]", run: Callable[[Callable[[int], None]], Any]) -> Any:
    """Run with a bar on stderr that counts requests."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(case.workload.requests for case in cases)
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TextColumn("requests"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        return run(lambda done: bar.update(task, advance=done))
