"""LoRA inside vLLM: what its requests say of their adapter, and which share a batch.

vLLM's CPU build computes rows without an adapter with the one in its last slot once a batch has any: they get
slot -1, which its torch operations take for an index from the end. Hence on that build requests to the model
alone carry an adapter too, one of zeros: x + 0 is x. vLLM gets a
slot more than the user asked for, so as many of the user's own fit in a batch as before.

Used by vllm_core.py, and by vllm_launch.py for the settings.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError
from llumnix.instance.user_cache import cached_folder
from llumnix.instance.vllm_adapters import CONFIG, WEIGHTS, Adapter, read_adapters, room_for
from llumnix.instance.vllm_launch import in_one_line

BLANK: Final = ";"
"""A name no adapter of a user can have: it separates them."""
MATRIX_A: Final = r"lora_(embedding_)?A"
ROOM: Final = {"max_loras": 1, "max_cpu_loras": None}
"""vLLM's settings that count adapters, with its defaults."""


def lora_arguments(adapters: tuple[Adapter, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM is told about adapters beside, or instead of, what the user says (``given``)."""
    if not adapters:
        return {}
    told: dict[str, Any] = {"enable_lora": True}
    if "max_lora_rank" not in given:
        told["max_lora_rank"] = room_for(adapters)
    if current_platform.is_cpu():
        counts = {name: given.get(name, default) for name, default in ROOM.items()}
        told |= {name: count + 1 for name, count in counts.items() if type(count) is int and count > 0}
    return told


class LoraRequests:
    """See the module. ``slots`` are vLLM's for adapters, 0 without."""

    def __init__(self, config: EngineConfig, slots: int) -> None:
        adapters = read_adapters(config)
        self._requests = {one.name: LoRARequest(one.name, one.number, one.folder) for one in adapters}
        self._slots = slots
        self._blank: LoRARequest | None = None
        if adapters and current_platform.is_cpu():
            folder = _blank_folder(Path(adapters[0].folder))
            self._blank = LoRARequest(BLANK, len(adapters) + 1, str(folder))

    def prepare(self, add: Callable[[LoRARequest], object], remove: Callable[[int], object]) -> None:
        """Have vLLM load each adapter once: one that it does not take would else end the step that first
        wants it, and the instance. The user's are loaded again when they are wanted."""
        for name, request in self._requests.items():
            in_one_line(partial(add, request), f"lora_modules: {name}: vLLM does not take it")
            remove(request.lora_int_id)
        if self._blank is not None:
            in_one_line(partial(add, self._blank), "vLLM does not take an adapter of zeros")

    @property
    def names(self) -> frozenset[str]:
        """The user's adapters."""
        return frozenset(self._requests)

    def request(self, adapter: str) -> LoRARequest | None:
        """What vLLM is told of a request with this adapter, or with none (empty)."""
        return self._requests.get(adapter) if adapter else self._blank

    def loaded(self, numbers: Iterable[int]) -> set[str]:
        """The user's adapters among those that vLLM holds by these numbers."""
        held = set(numbers)
        return {name for name, request in self._requests.items() if request.lora_int_id in held}

    def has_slot_for(self, adapter: str, others: Iterable[str]) -> bool:
        """Whether a request with this adapter can join a batch of requests with those."""
        if self.request(adapter) is None:
            return True
        used = {other for other in others if self.request(other) is not None}
        return adapter in used or len(used) < self._slots


def _blank_folder(like: Path) -> Path:
    """An adapter that changes nothing: one module's matrices of another, all zeros. vLLM takes none without
    any. In the user's cache, by what is in it: vLLM may read it again at any time, and an instance that is
    killed takes nothing away."""
    weights = _read_weights(like)
    down = min((name for name in weights if re.search(MATRIX_A, name)), default="")
    names = [name for name in (down, re.sub(MATRIX_A, r"lora_\1B", down)) if name in weights]
    if len(names) != 2:
        raise ConfigurationError(f"lora_modules: the weights in {like} have no pair of LoRA matrices")
    zeros = {name: torch.zeros_like(weights[name]) for name in names}
    files = {WEIGHTS[0]: save(zeros), CONFIG: (like / CONFIG).read_bytes()}

    def write(folder: Path) -> None:
        for name, data in files.items():
            (folder / name).write_bytes(data)

    digest = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in files.values()))
    return cached_folder("blank-adapters", digest.hexdigest(), write)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the file that vLLM would read."""
    file = next(folder / name for name in WEIGHTS if (folder / name).is_file())
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigurationError(f"lora_modules: cannot read {file}: {error}") from error
