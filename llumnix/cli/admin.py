"""Commands that ask or order a running cluster over HTTP. They start fast: nothing heavy is imported."""

import time
from typing import Any

import click

from llumnix.cli import policy, tables
from llumnix.cli.client import AdminClient, CommandFailed, NotNow
from llumnix.cli.server_options import server_options

FOLLOW_INTERVAL_S = 0.5
EVENTS_PAGE = 1000


@click.command()
@server_options
def status(url: str, token: str, as_json: bool) -> None:
    """Show the cluster in short."""
    answer = AdminClient(url, token).ask("status")
    (tables.print_json if as_json else tables.print_summary)(answer)


@click.command()
@server_options
def instances(url: str, token: str, as_json: bool) -> None:
    """List the instances and their load."""
    rows = AdminClient(url, token).ask("instances")["data"]
    _show(tables.INSTANCE_COLUMNS, rows, as_json, "no instances")


@click.command()
@server_options
def requests(url: str, token: str, as_json: bool) -> None:
    """List the requests on all instances."""
    rows = AdminClient(url, token).ask("requests")["data"]
    _show(tables.REQUEST_COLUMNS, rows, as_json, "no requests")


@click.command()
@click.argument("request")
@click.option("--to", "target", required=True, metavar="INSTANCE", help="Where it shall go.")
@server_options
def migrate(request: str, target: str, url: str, token: str, as_json: bool) -> None:
    """Move REQUEST to another instance while it runs."""
    result = AdminClient(url, token).order("migrate", request_id=request, target_id=target)
    _show(tables.MIGRATION_COLUMNS, [result], False, "") if not as_json else tables.print_json(result)
    if result["outcome"] != "committed":
        raise CommandFailed(f"{request} was not moved to {target}: {result['reason'] or result['outcome']}")


@click.command()
@click.argument("instance")
@server_options
def drain(instance: str, url: str, token: str, as_json: bool) -> None:
    """Move everything off INSTANCE and give it nothing new."""
    row = AdminClient(url, token).order("drain", instance_id=instance)
    tables.print_json(row) if as_json else print(f"{row['instance_id']} is {row['state']}")


@click.command()
@click.argument("instance")
@server_options
def resume(instance: str, url: str, token: str, as_json: bool) -> None:
    """Let a drained INSTANCE take requests again."""
    row = AdminClient(url, token).order("resume", instance_id=instance)
    tables.print_json(row) if as_json else print(f"{row['instance_id']} is {row['state']}")


@click.command("role")
@click.argument("instance")
@click.argument("role", type=click.Choice(("prefill", "decode", "neutral")))
@server_options
def set_role(instance: str, role: str, url: str, token: str, as_json: bool) -> None:
    """Let INSTANCE prefill only, decode only, or both. What no longer suits it moves away."""
    row = AdminClient(url, token).order("role", instance_id=instance, role=role)
    tables.print_json(row) if as_json else print(f"{row['instance_id']} is {row['role']}")


@click.command()
@click.argument("count", metavar="N", type=click.IntRange(min=1))
@server_options
def scale(count: int, url: str, token: str, as_json: bool) -> None:
    """Have N instances: start more, or drain and stop some."""
    answer = AdminClient(url, token).order("scale", instances=count)
    (tables.print_json if as_json else tables.print_summary)(answer)


@click.command()
@click.option("--follow", is_flag=True, help="Go on printing events as they happen.")
@click.option("--after", type=click.IntRange(min=0), default=0, help="Only events after this number.")
@server_options
def events(follow: bool, after: int, url: str, token: str, as_json: bool) -> None:
    """Print what happened in the cluster. With --json --follow, one JSON object a line."""
    client, gathered = AdminClient(url, token), []
    while True:
        try:
            page = client.ask("events", after=after, limit=EVENTS_PAGE)["data"]
        except NotNow:
            if not follow:
                raise
            page = []
        after = page[-1]["sequence"] if page else after
        if as_json and not follow:
            gathered += page
        else:
            for event in page:
                tables.print_json_line(event) if as_json else tables.print_event(event)
        if len(page) == EVENTS_PAGE:
            continue
        if not follow:
            break
        time.sleep(FOLLOW_INTERVAL_S)
    if as_json:
        tables.print_json(gathered)


def _show(columns: tuple[tables.Column, ...], rows: list[Any], as_json: bool, nothing: str) -> None:
    if as_json:
        tables.print_json(rows)
    else:
        tables.print_rows(columns, rows, nothing)


COMMANDS: tuple[click.Command, ...] = (
    *(status, instances, requests, migrate, drain, resume, set_role, scale, events),
    *(policy.policy, policy.explain),
)
