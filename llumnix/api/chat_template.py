"""A model's chat template: the Jinja program in its folder that turns messages into the text the model was
trained on.

Run in Jinja's sandbox with what such templates expect to find. Done here and not by transformers, whose
import alone takes seconds and hundreds of megabytes.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llumnix.core.errors import ConfigurationError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class PromptRefused(ValueError):
    """The model's chat template does not take this conversation."""


class ChatTemplate:
    """The template of a model folder; one without refuses every conversation. Raises ConfigurationError if
    the folder's is no valid template."""

    def __init__(self, folder: Path) -> None:
        config = _read_json(folder / "tokenizer_config.json")
        self._tokens = {name: _token_text(config[name]) for name in SPECIAL_TOKENS if config.get(name)}
        source = _source(folder, config)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        environment.filters["tojson"] = _to_json
        try:
            self._template = None if source is None else environment.from_string(source)
        except TemplateError as error:
            raise ConfigurationError(f"{folder}: its chat template is broken: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation up to where the assistant begins to speak. Raises PromptRefused."""
        if self._template is None:
            raise PromptRefused("this model has no chat template; use /v1/completions")
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._tokens)
        except (TemplateError, TypeError) as error:
            raise PromptRefused(f"the model's chat template refuses these messages: {error}") from error


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template's text: a file of its own, or in the tokenizer's settings, there perhaps one of
    several."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from error
    return read


def _token_text(token: str | Mapping[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
