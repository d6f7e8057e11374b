"""Results of simulations as a table and as a JSON file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llumnix import __version__
from llumnix.cli.tables import Row, print_rows
from llumnix.core.errors import ConfigurationError
from llumnix.sim.faults import Story
from llumnix.sim.presets import IGNORED
from llumnix.sim.runs import Result
from llumnix.sim.savings import BASELINE, over_seeds, savings


def _latency(kind: str, which: str, *, scale: float = 1.0, digits: int = 2) -> Any:
    def shown(row: Row) -> str:
        latency = row.get("latency_s")
        return f"{latency[kind][which] * scale:.{digits}f}" if latency and row["finished"] else "-"

    return shown


COLUMNS: tuple[tuple[str, Any], ...] = (
    ("workload", lambda row: row["workload"]),
    ("policy", lambda row: row["policy"]),
    ("request s", _latency("request", "mean")),
    ("P99", _latency("request", "p99")),
    ("prefill s", _latency("prefill", "mean")),
    ("P99", _latency("prefill", "p99")),
    ("decode ms", _latency("decode", "mean", scale=1e3, digits=1)),
    ("P99", _latency("decode", "p99", scale=1e3, digits=1)),
    ("loss s", lambda row: f"{row.get('preemption_loss_s', 0.0):.3f}"),
    ("preempted", lambda row: f"{row.get('preemptions', 0):.0f}"),
    ("moved", lambda row: f"{row['migrations']:.0f}"),
    ("fragm. %", lambda row: f"{row['fragmentation'] * 100:.2f}"),
    ("inst.-h", lambda row: f"{row['instance_hours']:.2f}"),
    ("failed", lambda row: f"{row['failed']:g}"),
)


def show(rows: Sequence[Row]) -> None:
    """The table, one line a case."""
    print_rows(COLUMNS, rows, "nothing was simulated")


def refuse_overruled(results: Sequence[Result]) -> None:
    """Raises ConfigurationError if a policy was overruled by its kind's default: then the numbers under its
    name are not its own."""
    for result in results:
        for error in result.summary.get("policy_errors", {}).values():
            raise ConfigurationError(f"{result.summary['policy']}: {error}, so these are not its numbers")


def show_priorities(rows: Sequence[Row]) -> None:
    """For every case with priorities, how many times shorter than without them its requests took."""
    runs = {(row["workload"], row["policy"]): row for row in rows}
    for (workload, policy), used in runs.items():
        ignored = runs.get((workload, policy + IGNORED))
        if ignored is None or not ("by_priority" in used and "by_priority" in ignored):
            continue
        for which in ("high", "normal"):
            before, after = (run["by_priority"][which]["latency_s"] for run in (ignored, used))
            shown = []
            for kind in ("request", "prefill", "decode"):
                mean, tail = (_times(before[kind][point], after[kind][point]) for point in ("mean", "p99"))
                shown.append(f"{kind} {mean} (P99 {tail})")
            print(f"{workload}, {policy}, times shorter, {which}: {', '.join(shown)}")


def _times(before: float, after: float) -> str:
    """How many times shorter; nothing to say of what did not happen, as decodes of answers of one token."""
    return f"{before / after:.2f}" if after else "-"


def show_savings(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One line for every setting that can be compared with the baseline at equal latency, over the seeds
    where it can; the same as data."""
    rows = []
    for one in results:
        scheduler = one.config["scheduler"]
        scaling = scheduler["scaling_policy"]
        setting = scheduler["scale_spare" if scaling == "demand" else "scale_low_freeness"]
        rows.append({**one.summary, "scaling": scaling, "setting": setting})
    found = over_seeds(savings(rows))
    for saving in found:
        print(
            f"{saving.workload}, {saving.policy} by {saving.scaling} {saving.setting:g}: "
            f"{saving.instance_hours:.2f} instance-hours where {BASELINE} by {saving.baseline_scaling} needs "
            f"{saving.baseline_hours:.2f} for P99 prefill {saving.prefill_p99_s:.1f} s: {saving.saved:.0%} "
            f"saved ({saving.saved_least:.0%} to {saving.saved_most:.0%}, {saving.seeds} seeds)"
        )
    return [asdict(saving) for saving in found]


def show_stories(stories: Sequence[Story]) -> None:
    """The sums over stories that all ended well, one line a field."""
    print(f"{'stories':<22} {len(stories)}")
    for field in fields(Story):
        if field.name != "seed":
            total = sum(getattr(story, field.name) for story in stories)
            print(f"{field.name.removesuffix('_s').replace('_', ' '):<22} {total:g}")


def write_json(
    path: Path,
    preset: str | None,
    options: dict[str, Any],
    results: Sequence[Result],
    means: Sequence[Row],
    saved: Sequence[dict[str, Any]],
) -> None:
    """What was asked, what came of it, and the means over several seeds. No clock is read: the same run
    writes the same bytes."""
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    content = {
        "version": __version__,
        "preset": preset,
        "options": asked,
        "cost_model": results[0].cost_model,
        "results": [{"config": result.config, **result.summary} for result in results],
        **({"means_over_seeds": list(means)} if means else {}),
        **({"saved_at_equal_p99": saved} if saved else {}),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
