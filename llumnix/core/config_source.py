"""Where settings come from: flags over a TOML file over defaults, all derived from the Config tree.

Plain data, so that the command line can make options of it without anything here knowing a command-line
library. A setting is ``[section] name`` in a file and ``--name`` as a flag; misspelt ones are refused with
the nearest name.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from llumnix.core.config import Config, SchedulerConfig
from llumnix.core.errors import ConfigurationError

Value = bool | int | float | str

FLAG_NAMES = {("engine", "kind"): "engine", ("engine", "engine_args"): "engine-arg"}
"""Flags not called like their field: its name would say too little, or a flag gives one of several."""
SEPARATORS = {("engine", "engine_args"): ";", ("engine", "lora_modules"): ";"}
"""Settings whose flag may be given several times, and what separates the values in the setting."""
SECRETS = frozenset({("frontend", "admin_token")})
KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the tree. ``flag`` has no dashes in front."""

    section: str
    name: str
    flag: str
    kind: type[bool] | type[int] | type[float] | type[str]
    default: Value
    help: str
    choices: tuple[str, ...]


def settings() -> tuple[Setting, ...]:
    """Every setting there is, in the tree's order. Raises ConfigurationError if two would share a flag."""
    found: dict[str, Setting] = {}
    for section, leaf in get_type_hints(Config).items():
        kinds = get_type_hints(leaf)
        for spec in fields(leaf):
            flag = FLAG_NAMES.get((section, spec.name), spec.name.replace("_", "-"))
            if flag in found:
                raise ConfigurationError(f"two settings would be --{flag}: give one a name in FLAG_NAMES")
            found[flag] = Setting(
                section=section,
                name=spec.name,
                flag=flag,
                kind=kinds[spec.name],
                default=_default(spec),
                help=spec.metadata["help"],
                choices=spec.metadata["choices"],
            )
    return tuple(found.values())


def read_file(path: Path) -> dict[tuple[str, str], Value]:
    """The settings in a TOML file, by (section, name). Raises ConfigurationError naming the file and what is
    wrong."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from error
    known = {(setting.section, setting.name): setting for setting in settings()}
    sections = sorted({section for section, _ in known})
    values: dict[tuple[str, str], Value] = {}
    for section, table in tables.items():
        if section not in sections:
            raise ConfigurationError(f"{path}: unknown section [{section}]{_nearest(section, sections)}")
        if not isinstance(table, dict):
            raise ConfigurationError(f"{path}: {section} is a section, write [{section}]")
        names = [name for where, name in known if where == section]
        for name, value in table.items():
            if name not in names:
                raise ConfigurationError(f"{path}: unknown setting {section}.{name}{_nearest(name, names)}")
            values[section, name] = _checked(known[section, name], value, str(path))
    return values


def build_config(
    flags: Mapping[tuple[str, str], Value], path: Path | None = None, base: Config | None = None
) -> Config:
    """The configuration of a run: flags over the file, if any, over ``base`` or else the defaults."""
    given = {**(read_file(path) if path else {}), **flags}
    leaves: dict[str, Any] = {}
    for section, leaf in get_type_hints(Config).items():
        values = {name: value for (where, name), value in given.items() if where == section}
        leaves[section] = leaf(**values) if base is None else replace(getattr(base, section), **values)
    return Config(**leaves)


def with_settings(config: SchedulerConfig, texts: Mapping[str, str]) -> SchedulerConfig:
    """The scheduler's settings with these replaced, each given as text. Raises ConfigurationError naming the
    one that is wrong."""
    known = {setting.name: setting for setting in settings() if setting.section == "scheduler"}
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in known:
            raise ConfigurationError(f"unknown setting {name}{_nearest(name, sorted(known))}")
        kind = known[name].kind
        try:
            values[name] = kind(text)
        except ValueError:
            raise ConfigurationError(f"{name} must be {KIND_NAMES[kind]}, got {text!r}") from None
    return replace(config, **values)


def as_texts(config: SchedulerConfig) -> tuple[tuple[str, str], ...]:
    """Every setting of the scheduler as (name, text), as ``with_settings`` takes them."""
    return tuple((spec.name, str(getattr(config, spec.name))) for spec in fields(config))


def to_toml(config: Config) -> str:
    """The whole tree as a file that ``read_file`` takes. Secrets are left out, with a remark that they are
    set."""
    lines: list[str] = []
    for section in get_type_hints(Config):
        leaf = getattr(config, section)
        lines.append(f"[{section}]")
        for spec in fields(leaf):
            value = getattr(leaf, spec.name)
            if (section, spec.name) in SECRETS:
                lines += [f"# {spec.name} is set, and not shown"] if value else []
            else:
                lines.append(f"{spec.name} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Value) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=True)  # a JSON string is a TOML basic string
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _checked(setting: Setting, value: object, where: str) -> Value:
    if setting.kind is float and type(value) is int:
        return float(value)
    if type(value) is not setting.kind:
        wanted = KIND_NAMES[setting.kind]
        raise ConfigurationError(f"{where}: {setting.section}.{setting.name} must be {wanted}, got {value!r}")
    assert isinstance(value, bool | int | float | str)
    return value


def _default(spec: "Field[Any]") -> Value:
    assert isinstance(spec.default, bool | int | float | str)
    return spec.default


def _nearest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
