"""Results of simulations as a table and as a JSON file."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from llumnix import __version__
from llumnix.cli.tables import Row, print_rows
from llumnix.sim.faults import Story
from llumnix.sim.runs import Result


def _latency(kind: str, which: str, *, scale: float = 1.0, digits: int = 2) -> Any:
    def shown(row: Row) -> str:
        latency = row.get("latency_s")
        return f"{latency[kind][which] * scale:.{digits}f}" if latency else "-"

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
    ("preempted", lambda row: f"{row.get('preemptions', 0)}"),
    ("moved", lambda row: f"{row['migrations']}"),
    ("fragm. %", lambda row: f"{row['fragmentation'] * 100:.2f}"),
    ("inst.-h", lambda row: f"{row['instance_hours']:.2f}"),
    ("failed", lambda row: f"{row['failed']}"),
)


def show(results: Sequence[Result]) -> None:
    """The table, one line a run."""
    print_rows(COLUMNS, [result.summary for result in results], "nothing was simulated")


def show_stories(stories: Sequence[Story]) -> None:
    """The sums over stories that all ended well, one line a field."""
    print(f"{'stories':<22} {len(stories)}")
    for field in fields(Story):
        if field.name != "seed":
            total = sum(getattr(story, field.name) for story in stories)
            print(f"{field.name.removesuffix('_s').replace('_', ' '):<22} {total:g}")


def write_json(path: Path, preset: str | None, options: dict[str, Any], results: Sequence[Result]) -> None:
    """What was asked and what came of it. No clock is read: the same run writes the same bytes."""
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    content = {
        "version": __version__,
        "preset": preset,
        "options": asked,
        "cost_model": results[0].cost_model,
        "results": [{"config": result.config, **result.summary} for result in results],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
