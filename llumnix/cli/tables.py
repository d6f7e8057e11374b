"""What commands print: tables for people, JSON for programs."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PIPE_WIDTH = 200

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def plain(name: str) -> Callable[[Row], str]:
    """A column that shows a field as it is."""
    return lambda row: str(row[name])


def _host_memory(swap: Row | None) -> str:
    return f"{swap['host_used']}/{swap['host_capacity']}" if swap else "none"


INSTANCE_COLUMNS: tuple[Column, ...] = (
    ("instance", plain("instance_id")),
    ("state", plain("state")),
    ("role", plain("role")),
    ("blocks", lambda row: f"{row['used_blocks']}/{row['capacity_blocks']}"),
    ("host KV", lambda row: _host_memory(row["swap"])),
    ("running", plain("running")),
    ("waiting", plain("waiting")),
    ("in/out", lambda row: f"{row['migrating_in']}/{row['migrating_out']}"),
    ("freeness", lambda row: f"{row['freeness']:.1f}"),
    ("step ms", lambda row: f"{row['step_ms']:.1f}"),
    ("tokens", plain("tokens_total")),
    ("preempted", plain("preemptions_total")),
    ("report", lambda row: f"{row['report_age_s']:.1f} s ago"),
    ("host", lambda row: row["address"].rpartition(":")[0].removeprefix("tcp://")),
    ("pid", plain("pid")),
)
REQUEST_COLUMNS: tuple[Column, ...] = (
    ("request", plain("request_id")),
    ("instance", plain("instance_id")),
    ("status", plain("status")),
    ("tenant", plain("tenant")),
    ("priority", lambda row: f"{row['scheduling_priority']}/{row['execution_priority']}"),
    ("prompt", plain("prompt_tokens")),
    ("output", lambda row: f"{row['output_tokens']}/{row['max_tokens']}"),
    ("blocks", plain("blocks")),
    ("preempted", plain("preemptions")),
    ("age", lambda row: f"{row['age_s']:.1f} s"),
)
MIGRATION_COLUMNS: tuple[Column, ...] = (
    ("request", plain("request_id")),
    ("from", plain("source_id")),
    ("to", plain("target_id")),
    ("outcome", plain("outcome")),
    ("stages", plain("stages")),
    ("KV", lambda row: f"{row['kv_bytes'] / 2**20:.2f} MiB"),
    ("took", lambda row: f"{row['duration_s'] * 1e3:.1f} ms"),
    ("paused", lambda row: f"{row['pause_s'] * 1e3:.1f} ms"),
)

DECISION_COLUMNS: tuple[Column, ...] = (
    ("when", lambda row: f"{row['age_s']:.3f} s ago"),
    ("decision", plain("kind")),
    ("from", plain("source_id")),
    ("instance", plain("instance_id")),
    ("policy", plain("policy")),
    ("of", lambda row: str(row["candidates"] or "")),
    ("scores", lambda row: ", ".join(f"{name} {score:.4g}" for name, score in row["scores"])),
    ("reason", plain("reason")),
)


def print_json(answer: Any) -> None:
    """The answer as one JSON value."""
    print(json.dumps(answer, indent=2))


def print_rows(columns: Sequence[Column], rows: Sequence[Row], nothing: str) -> None:
    """A table, or the sentence ``nothing`` if there are no rows."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        print(nothing)
        return
    table = Table(box=box.SIMPLE_HEAD)
    for title, _ in columns:
        table.add_column(title, no_wrap=True)
    for row in rows:
        table.add_row(*[Text(show(row)) for _, show in columns])
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def print_summary(status: Row) -> None:
    """The cluster's summary, one line a field."""
    for name, value in status.items():
        shown = f"{value:.0f} s" if name == "uptime_s" else value
        print(f"{name.removesuffix('_s').replace('_', ' '):<22} {shown}")


def print_event(event: Row) -> None:
    """One event as a line."""
    from datetime import datetime

    at = datetime.fromtimestamp(event["at_s"]).strftime("%H:%M:%S.%f")[:-3]
    print(f"{event['sequence']:>6}  {at}  {event['kind']:<17} {event['text']}", flush=True)


def print_json_line(answer: Any) -> None:
    """The answer as one line of JSON, at once."""
    print(json.dumps(answer), flush=True)
