"""Options shared by every command that calls a running cluster."""

from collections.abc import Callable
from typing import Any

import click

DEFAULT_URL = "http://127.0.0.1:8000"

Command = Callable[..., Any]


def server_options(command: Command) -> Command:
    """--url, --token and --json."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON for programs."),
        click.option("--token", envvar="LLUMNIX_ADMIN_TOKEN", default="", help="Admin token of the server."),
        click.option(
            "--url", envvar="LLUMNIX_URL", default=DEFAULT_URL, show_default=True, help="The server."
        ),
    ):
        command = option(command)
    return command
