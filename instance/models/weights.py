"""A decoder's weights: which tensors a model must have, reading them from safetensors, or making random ones.

Query, key and value projections are fused, and so are gate and up; ``kernels.ops`` then lays each weight out
for the device. A folder whose tensors do not fit its config.json is refused by name before anything is read.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llumnix.core.errors import ConfigurationError
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.models.decoder import DecoderWeights, LayerWeights
from llumnix.kernels import ops
from llumnix.kernels.interface import Linear

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
NAMES_SHOWN_MAX = 5
RANDOM_SCALE = 0.02  # standard deviation usual for fresh language models

EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

Shape = tuple[int, ...]
Take = Callable[[str], Tensor]


class _Shard(Protocol):
    """The part of an open safetensors file that is used here."""

    def get_tensor(self, name: str) -> Tensor: ...

    def get_slice(self, name: str) -> Any: ...


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a model, in Hugging Face's naming."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden), FINAL_NORM: (hidden,)}
    if not config.tied_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    for index in range(config.layers):
        layer = f"model.layers.{index}."
        for part, size in (("q", query), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{part}_proj.weight"] = (size, hidden)
            if config.qkv_bias:
                shapes[f"{layer}self_attn.{part}_proj.bias"] = (size,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, query)
        if config.output_bias:
            shapes[f"{layer}self_attn.o_proj.bias"] = (hidden,)
        if config.qk_norm:
            shapes[f"{layer}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{layer}self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[f"{layer}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> DecoderWeights:
    """Weights of the model in ``folder``. Raises ConfigurationError naming missing, extra or misshapen
    tensors."""
    files = _tensor_files(folder)
    try:
        shards: dict[Path, _Shard] = {
            file: safe_open(file, framework="pt") for file in sorted(set(files.values()))
        }
        _check_tensors(
            folder, config, {name: shards[file].get_slice(name).get_shape() for name, file in files.items()}
        )
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{folder}: cannot read weights: {error}") from error

    def take(name: str) -> Tensor:
        return shards[files[name]].get_tensor(name).to(device=device, dtype=dtype)

    return _assemble(config, take)


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> DecoderWeights:
    """Weights of the right shapes and plausible size, for benchmarks: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_tensors(config)

    def take(name: str) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name], dtype=dtype, device=device)
        return (torch.randn(shapes[name], generator=generator) * RANDOM_SCALE).to(device=device, dtype=dtype)

    return _assemble(config, take)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor: a single file, or shards listed in an index."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    try:
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            return {name: folder / file for name, file in weight_map.items()}
        if single.is_file():
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"{folder}: cannot read weights: {error!r}") from error
    raise ConfigurationError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def _ignorable(name: str, config: ModelConfig) -> bool:
    """Tensors that some files carry and nobody needs: saved rope tables, and a second copy of tied
    embeddings."""
    return name.endswith("rotary_emb.inv_freq") or (name == LM_HEAD and config.tied_embeddings)


def _check_tensors(folder: Path, config: ModelConfig, found: Mapping[str, list[int]]) -> None:
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not _ignorable(name, config)]
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    problems = [
        f"{what}: {', '.join(names[:NAMES_SHOWN_MAX])}"
        + (f" and {len(names) - NAMES_SHOWN_MAX} more" if len(names) > NAMES_SHOWN_MAX else "")
        for what, names in (("missing", missing), ("unexpected", extra), ("wrong shape", misshapen))
        if names
    ]
    if problems:
        raise ConfigurationError(f"{folder}: weights do not fit config.json; {'; '.join(problems)}")


def _assemble(config: ModelConfig, take: Take) -> DecoderWeights:
    embedding = ops.prepare_linear(take(EMBEDDING))
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_layer(config, take, f"model.layers.{index}.") for index in range(config.layers)),
        final_norm=take(FINAL_NORM),
        lm_head=embedding if config.tied_embeddings else ops.prepare_linear(take(LM_HEAD)),
    )


def _layer(config: ModelConfig, take: Take, prefix: str) -> LayerWeights:
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    return LayerWeights(
        input_norm=take(f"{prefix}input_layernorm.weight"),
        qkv=_fused_qkv(config, take, attention),
        query_norm=take(f"{attention}q_norm.weight") if config.qk_norm else None,
        key_norm=take(f"{attention}k_norm.weight") if config.qk_norm else None,
        output=ops.prepare_linear(
            take(f"{attention}o_proj.weight"),
            take(f"{attention}o_proj.bias") if config.output_bias else None,
        ),
        mlp_norm=take(f"{prefix}post_attention_layernorm.weight"),
        gate_up=ops.prepare_gated(take(f"{mlp}gate_proj.weight"), take(f"{mlp}up_proj.weight")),
        down=ops.prepare_linear(take(f"{mlp}down_proj.weight")),
    )


def _fused_qkv(config: ModelConfig, take: Take, attention: str) -> Linear:
    weight = torch.cat([take(f"{attention}{part}_proj.weight") for part in "qkv"])
    bias = torch.cat([take(f"{attention}{part}_proj.bias") for part in "qkv"]) if config.qkv_bias else None
    return ops.prepare_linear(weight, bias)
