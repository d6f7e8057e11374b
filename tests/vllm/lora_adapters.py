"""LoRA adapters for SmolLM2, written as PEFT writes them: two that answer differently from the model and from
each other. Random matrices: nothing is learnt, but every layer's queries and values change."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, KV_WIDTH, RANK = 30, 576, 192, 4
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
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    return folder
