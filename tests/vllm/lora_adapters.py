"""LoRA adapters for SmolLM2, written as PEFT writes them: two that answer differently from the model and from
each other. Random matrices: nothing is learnt, but every layer's queries and values change."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LAYERS, HIDDEN, KV_WIDTH, RANK = 30, 576, 192, 4
ALPHA = 8
STRENGTH = 0.06


def write_adapter(folder: Path, seed: int) -> Path:
    """An adapter of rank 4 on q_proj and v_proj."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for name, width in (("q_proj", HIDDEN), ("v_proj", KV_WIDTH)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=draw) * STRENGTH
            weights[f"{stem}.lora_B.weight"] = torch.randn(width, RANK, generator=draw) * STRENGTH
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]}
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
