"""``llumnix profile``: fit a cost model to a real engine, for the simulator."""

from pathlib import Path
from typing import Any

import click

from llumnix.cli.config_flags import config_options, resolve
from llumnix.cli.output_paths import OUTPUT_FILE
from llumnix.core.config_source import Value


@click.command("profile")
@click.option(
    "--out",
    type=OUTPUT_FILE,
    required=True,
    help="Write the cost model there, for simulate --cost-model.",
)
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Write all points there.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the points kept for checking.",
)
@config_options
def command(
    out: Path, json_file: Path | None, seed: int, config_file: Path | None, **given: Value | None
) -> None:
    """Time steps of a real engine and fit a cost model to them.

    Runs as many engines at once as --instances says, since they share the machine; then a real cluster, for
    what serving adds. Settings are those of serve. Takes about three minutes, on a machine that has nothing
    else to do."""
    config = resolve(config_file, given)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from llumnix.bench import profile

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("kinds of steps"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=profile.parts())
        result = profile.profile(config, seed, lambda done: bar.update(task, advance=done))
    profile.write_model(out, result.cost)
    if json_file is not None:
        profile.write_report(json_file, result.report)
    _show(result.report)
    print(f"cost model written to {out}")


def _show(report: dict[str, Any]) -> None:
    for name, value in report["cost_model"].items():
        if name.endswith("_ms"):
            print(f"{name:<14} {value:.6g}")
        elif name.endswith("_spread"):
            print(f"{name:<14} {', '.join(f'{point:.3g}' for point in value)}")
    for use, errors in report["errors"].items():
        if not errors["steps"]:
            continue
        print(
            f"{use.replace('_', ' ')}: off by {errors['mean']:.1%} on average, {errors['p90']:.1%} at P90, "
            f"{errors['worst']:.1%} at worst, over {errors['steps']} kinds of steps"
        )
    disturbed = report["disturbed"]
    if disturbed["steps"]:
        print(
            f"{disturbed['steps']} steps were disturbed by others on this machine and not counted; "
            f"{disturbed['kinds_left_out']} kinds of steps had too few others"
        )
    serving = report["serving"]
    for pace in serving["paces"]:
        what = f"batch {pace['batch']}, per token" if pace["batch"] else f"prompt of {pace['prompt']}"
        print(
            f"in service, {what}: {pace['measured_ms']:.1f} ms, {pace['formula_ms']:.1f} by the engine alone"
        )
    print(
        f"serving adds {serving['share']:.1%} to every step, {serving['per_request_ms']:.2f} ms for each "
        f"request it decodes, {serving['first_token_ms']:.1f} ms to a first token"
    )
    arrivals = report["arrivals"]
    for kind in ("decode", "prefill"):
        steps = arrivals[kind]
        if steps["steps"]:
            print(
                f"{steps['steps']} steps that {kind} while requests come and go take {steps['mean']:.1%} of "
                f"the model's on average, with a standard deviation of {steps['deviation']:.1%}"
            )
    if arrivals["not_told_apart"]:
        print(f"{arrivals['not_told_apart']} times an instance's steps could not be told apart")
