"""From the name a user gives to a model's folder, and what that folder says besides weights and tokenizer.

A name is a folder, the alias ``smollm2``, or a hub id. Frontends call this too, for the tokenizer's folder,
so nothing here needs torch; weights are read by models/weights.py.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llumnix.core.errors import ConfigurationError
from llumnix.instance import smollm2
from llumnix.instance.models.config import ModelConfig, parse_config

SMOLLM2_ALIAS: Final = "smollm2"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES: Final = ("*.json", "*.safetensors", "*.jinja")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model's folder with its parsed configuration. ``eos_token_ids`` end a text (may be empty)."""

    path: Path
    config: ModelConfig
    eos_token_ids: frozenset[int]


def resolve_model(name: str) -> Path:
    """The folder of a model, fetched or converted first if need be. Raises ConfigurationError in one line."""
    if name == SMOLLM2_ALIAS:
        return smollm2.ensure_folder()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if HUB_ID.fullmatch(name):
        return _hub_snapshot(name)
    raise ConfigurationError(
        f"model {name!r} is neither a folder, nor a hub id (owner/name), nor the alias {SMOLLM2_ALIAS}"
    )


def read_model_folder(path: Path) -> ModelFolder:
    """Parse config.json and generation_config.json. Raises ConfigurationError naming the file and what is
    wrong."""
    raw = read_json(path / "config.json")
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    ended_by = generation.get("eos_token_id")
    eos = raw.get("eos_token_id") if ended_by is None else ended_by
    try:
        return ModelFolder(path, parse_config(raw), token_ids(eos))
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises ConfigurationError naming the file and what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold a JSON object")
    return content


def token_ids(eos: object) -> frozenset[int]:
    """One id, a list of them, or none."""
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in ids):
        raise ConfigurationError(f"eos_token_id must be a token id or a list of them, got {eos!r}")
    return frozenset(ids)


def _hub_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigurationError(
            f"model {name!r} is no folder here, and the hub did not give it: {first_line}"
        ) from error
