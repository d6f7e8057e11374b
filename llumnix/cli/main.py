"""The ``llumnix`` command. Errors are one line on stderr and a non-zero exit; nothing heavy is imported
before a command needs it."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import click

from llumnix import __version__
from llumnix.cli import admin, profile, simulate
from llumnix.cli.config_flags import config_options, resolve
from llumnix.core.config_source import Value, to_toml
from llumnix.core.errors import LlumnixError

BENCHMARKS = {
    "engine": "tokens per second and step times of one engine",
    "fairness": "tails under priority updates, by way of swapping",
    "frontend": "a thousand streaming clients on a simulated cluster",
    "live": "bursts on a real cluster: migration off and on, priorities ignored and used",
    "migration": "downtime of live migrations against other ways to move",
    "scheduler": "time per decision of the global scheduler, by number of instances",
    "simulator": "time and memory of a simulated cluster",
    "swap": "copies, bandwidth and bookkeeping of swapping KV to host memory",
    "validation": "one workload on a real cluster and in the simulator",
    "vllm_serving": "vLLM's own benchmark client against two vLLM instances, migration off and on",
}
FAILED, MISUSED, INTERRUPTED = 1, 2, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Serve one model on many instances, and move running requests between them."""


@cli.command()
@config_options
def serve(config_file: Path | None, **given: Value | None) -> int:
    """Start a cluster and serve the OpenAI API until Ctrl-C."""
    config = resolve(config_file, given)
    from llumnix.runtime.launch import serve as run

    return run(config)


@cli.command("config")
@config_options
def show_config(config_file: Path | None, **given: Value | None) -> None:
    """Print the settings that serve would use, as TOML."""
    print(to_toml(resolve(config_file, given)), end="")


@cli.command()
def version() -> None:
    """Print the version."""
    print(__version__)


class _Benchmarks(click.Group):
    """Loads a benchmark only when it is run: some need torch, some start clusters."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(BENCHMARKS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in BENCHMARKS:
            return None
        command = import_module(f"llumnix.bench.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Benchmarks"):
            formatter.write_dl(sorted(BENCHMARKS.items()))


@cli.group(cls=_Benchmarks)
def bench() -> None:
    """Measure something, and write it as JSON."""


for _command in (*admin.COMMANDS, profile.command, simulate.command):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status. 1: it failed, 2: it was misused, 130: interrupted."""
    try:
        result = cli.main(args=arguments, prog_name="llumnix", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else error.format_message(), file=sys.stderr)
        return MISUSED
    except click.UsageError as error:
        where = f"{error.ctx.command_path}: " if error.ctx else "llumnix: "
        return _failed(where + error.format_message(), MISUSED)
    except click.ClickException as error:
        return _failed(f"llumnix: {error.format_message()}", FAILED)
    except LlumnixError as error:
        return _failed(f"llumnix: {error}", FAILED)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _failed(text: str, status: int) -> int:
    print(" ".join(text.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
