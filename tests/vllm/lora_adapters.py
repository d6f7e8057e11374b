"""LoRA adapters written as PEFT writes them, of which each answers differently from the model and from the
others. Random matrices: nothing is learnt, but every layer changes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RANK = 4
ALPHA = 8
STRENGTH = 0.06


@dataclass(frozen=True)
class Adapted:
    """What of a model an adapter changes: ``modules`` by name within a layer, with their width in and out."""

    layers: int
    modules: dict[str, tuple[int, int]]


SMOLLM2 = Adapted(30, {"self_attn.q_proj": (576, 576), "self_attn.v_proj": (576, 192)})


def write_adapter(folder: Path, seed: int, adapted: Adapted = SMOLLM2) -> Path:
    """An adapter of rank 4."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(adapted.layers):
        for name, (inner, outer) in adapted.modules.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(RANK, inner, generator=draw) * STRENGTH
            weights[f"{stem}.lora_B.weight"] = torch.randn(outer, RANK, generator=draw) * STRENGTH
    save_file(weights, folder / "adapter_model.safetensors")
    names = [name.rpartition(".")[2] for name in adapted.modules]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    return folder


def merge_adapter(model: Any, folder: Path) -> None:
    """Add what an adapter changes, ``alpha / r * B @ A`` (arXiv 2106.09685), to the weights of the model of
    transformers."""
    weights = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, down in weights.items():
            if name.endswith("lora_A.weight"):
                up = weights[name.replace("lora_A", "lora_B")]
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                model.get_submodule(module).weight += ALPHA / RANK * up @ down
