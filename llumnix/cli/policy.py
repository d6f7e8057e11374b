"""Commands about the scheduler's decisions: show and change its policies, explain what it did with a request.

They call the server like the other administrators' commands (admin.py), which registers them.
"""

import click

from llumnix.cli import tables
from llumnix.cli.client import AdminClient, CommandFailed
from llumnix.cli.server_options import server_options


@click.group()
def policy() -> None:
    """Show or change how requests are placed and moved."""


@policy.command()
@server_options
def show(url: str, token: str, as_json: bool) -> None:
    """Show the policies in force, the names there are, and the scheduler's settings."""
    _show(AdminClient(url, token).ask("policy"), as_json)


@policy.command("set")
@click.argument("kind")
@click.argument("name")
@click.option(
    "--setting",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting to change with it; repeat it.",
)
@server_options
def set_policy(kind: str, name: str, settings: tuple[str, ...], url: str, token: str, as_json: bool) -> None:
    """Go by policy NAME for KIND (dispatch, pairing, scaling …: see policy show) from now on."""
    values: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key or key in values:
            raise CommandFailed(f"--setting takes KEY=VALUE, each key once; got {setting!r}")
        values[key] = value
    _show(AdminClient(url, token).order("policy", kind=kind, name=name, settings=values), as_json)


@click.command()
@click.argument("request")
@server_options
def explain(request: str, url: str, token: str, as_json: bool) -> None:
    """Tell where REQUEST was placed and moved, with scores and reasons."""
    rows = AdminClient(url, token).ask("explain", request=request)["data"]
    if as_json:
        tables.print_json(rows)
    else:
        tables.print_rows(tables.DECISION_COLUMNS, rows, "no decisions")


def _show(state: tables.Row, as_json: bool) -> None:
    if as_json:
        tables.print_json(state)
        return
    rows = [
        {"kind": kind, "name": name, "known": ", ".join(state["known"][kind])}
        for kind, name in state["policies"].items()
    ]
    columns = (
        ("kind", tables.plain("kind")),
        ("policy", tables.plain("name")),
        ("known", tables.plain("known")),
    )
    tables.print_rows(columns, rows, "no policies")
    for name, value in state["settings"].items():
        print(f"{name:<26} {value}")
