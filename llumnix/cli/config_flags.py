"""Options of commands that take the whole configuration, derived from its tree."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from llumnix.core.config import Config
from llumnix.core.config_source import SEPARATORS, Setting, Value, build_config, read_file, settings

ENVIRONMENT = {"admin_token": "LLUMNIX_ADMIN_TOKEN"}


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each setting, and --config FILE. Settings left out are None."""
    for setting in reversed(settings()):
        command = click.option(
            f"--{setting.flag}/--no-{setting.flag}" if setting.kind is bool else f"--{setting.flag}",
            _parameter(setting),
            type=click.Choice(setting.choices) if setting.choices else setting.kind,
            default=None,
            multiple=(setting.section, setting.name) in SEPARATORS,
            envvar=ENVIRONMENT.get(setting.name),
            help=f"{setting.help} [{_default(setting)}]",
            metavar=None if setting.choices or setting.kind is bool else setting.kind.__name__.upper(),
        )(command)
    path = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option("--config", "config_file", type=path, help="TOML file with settings; flags win.")(
        command
    )


def _parameter(setting: Setting) -> str:
    return f"{setting.section}__{setting.name}"


def _default(setting: Setting) -> str:
    return "empty" if setting.default == "" else str(setting.default)


def resolve(
    config_file: Path | None, given: Mapping[str, Value | tuple[str, ...] | None], base: Config | None = None
) -> Config:
    """The configuration from a command's parameters: options over the file over ``base``, which stands for
    the defaults."""
    flags: dict[tuple[str, str], Value] = {}
    if base is not None:
        for section in fields(base):
            leaf = getattr(base, section.name)
            flags.update(((section.name, spec.name), getattr(leaf, spec.name)) for spec in fields(leaf))
        flags.update(read_file(config_file) if config_file else {})
    for parameter, value in given.items():
        section_name, _, name = parameter.partition("__")
        if isinstance(value, tuple):  # an option that may be given several times
            value = SEPARATORS[section_name, name].join(value) if value else None
        if value is not None:
            flags[section_name, name] = value
    return build_config(flags, None if base is not None else config_file)
