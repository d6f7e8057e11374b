"""The LoRA adapters that a vLLM cluster serves beside its model: what the user named, checked before anything
is started, and without importing vLLM. Called by frontends and by vllm_launch.py.

An adapter's number within vLLM is its place in the settings of its instance; its name is what travels. vLLM's
prefix cache hashes names and folders in, so no adapter finds another's KV.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llumnix.core.config import EngineConfig, parse_lora_modules
from llumnix.core.errors import ConfigurationError
from llumnix.instance.model_loader import read_json

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks vLLM can be told to make room for."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """``number`` is vLLM's for it, 1 or more. ``rank`` of its matrices at most."""

    name: str
    number: int
    folder: str
    rank: int


def read_adapters(config: EngineConfig) -> tuple[Adapter, ...]:
    """The adapters of ``lora_modules``, in their order. Raises ConfigurationError naming the one that is
    wrong."""
    folders = parse_lora_modules(config.lora_modules)
    return tuple(_read(name, number, folder) for number, (name, folder) in enumerate(folders.items(), 1))


def room_for(adapters: tuple[Adapter, ...]) -> int:
    """The least rank vLLM can be told of that all of these fit in."""
    return next(rank for rank in RANKS if rank >= max(one.rank for one in adapters))


def _read(name: str, number: int, text: str) -> Adapter:
    folder = Path(text).expanduser().resolve()
    if not (folder / CONFIG).is_file():
        raise ConfigurationError(f"lora_modules: {name}: {folder} has no {CONFIG}")
    raw = read_json(folder / CONFIG)
    ranks = [raw.get("r"), *(raw.get("rank_pattern") or {}).values()]
    if any(type(rank) is not int or not 1 <= rank <= RANKS[-1] for rank in ranks):
        raise ConfigurationError(f"lora_modules: {name}: r in {CONFIG} must be within 1 and {RANKS[-1]}")
    if not any((folder / file).is_file() for file in WEIGHTS):
        raise ConfigurationError(f"lora_modules: {name}: {folder} has none of {', '.join(WEIGHTS)}")
    return Adapter(name, number, str(folder), max(ranks))
