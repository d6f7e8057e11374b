"""Cost models by roofline: ``model@device`` from a model's shape and a device's bandwidth and compute.

Reading weights and KV is bound by memory bandwidth, prefill by compute. Devices reach neither of their
data-sheet numbers; the shares below are those of the one published measurement we have, LLaMA-7B on A10
(cost.py): 411 of 600 GB/s while decoding, and in prefill 2 × 6.74e9 operations in 0.21 ms, 64 of 125 TFLOP/s.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from llumnix.core.errors import ConfigurationError
from llumnix.sim.cost import A10_BYTES_PER_MS, LLAMA_7B_A10, CostModel, read_cost_model

A10_BYTES_PER_S, A10_FLOPS = 600e9, 125e12
LLAMA_7B_PARAMETERS = 6.74e9
BANDWIDTH_SHARE = A10_BYTES_PER_MS * 1e3 / A10_BYTES_PER_S
COMPUTE_SHARE = 2 * LLAMA_7B_PARAMETERS / (LLAMA_7B_A10.token_ms * 1e-3) / A10_FLOPS
MEMORY_SHARE = 0.9
BYTES = 2  # of a weight or KV element in bfloat16


@dataclass(frozen=True, slots=True)
class Device:
    """Data-sheet numbers, dense half precision. ``link_bytes_per_s`` between instances."""

    bytes_per_s: float
    flops: float
    memory_bytes: float
    link_bytes_per_s: float


DEVICES = {
    "a10": Device(A10_BYTES_PER_S, A10_FLOPS, 24e9, 8e9),
    "a100-80g": Device(2039e9, 312e12, 80e9, 25e9),
    "h100-80g": Device(3350e9, 989e12, 80e9, 50e9),
    "h200": Device(4800e9, 989e12, 141e9, 50e9),
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a step's cost depends on; names as in a Hugging Face config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def parameters(self) -> int:
        """Of a Llama-like model."""
        attention = (
            self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads) * 2
        )
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings


MODELS = {
    "llama-7b": ModelShape(4096, 32, 32, 32, 128, 11008, 32000, 16384, False),
    "llama-3-8b": ModelShape(4096, 32, 32, 8, 128, 14336, 128256, 131072, False),
    "qwen-2.5-32b": ModelShape(5120, 64, 40, 8, 128, 27648, 152064, 131072, False),
    "smollm2-135m": ModelShape(576, 30, 9, 3, 64, 1536, 49152, 8192, True),
}
LENGTH_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "vocab_size", "max_position_embeddings"),
)


def read_shape(path: Path) -> ModelShape:
    """A model's shape from its config.json. Raises ConfigurationError naming file and field."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: a model's config is an object")
    for name in LENGTH_FIELDS:
        if not isinstance(values.get(name), int) or values[name] < 1:
            raise ConfigurationError(
                f"{path}: {name} must be a positive whole number, got {values.get(name)!r}"
            )
    heads = values["num_attention_heads"]
    return ModelShape(
        hidden_size=values["hidden_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        intermediate_size=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        max_position_embeddings=values["max_position_embeddings"],
        tie_word_embeddings=bool(values.get("tie_word_embeddings")),
    )


def roofline(name: str, shape: ModelShape, device: Device) -> CostModel:
    """The cost model of a model on a device. Raises ConfigurationError if it does not fit."""
    kv_bytes = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * BYTES
    bytes_per_ms = device.bytes_per_s * BANDWIDTH_SHARE * 1e-3
    flops_per_ms = device.flops * COMPUTE_SHARE * 1e-3
    room = device.memory_bytes * MEMORY_SHARE - shape.parameters * BYTES
    if room < kv_bytes * 1024:
        raise ConfigurationError(f"{name}: the weights leave no room for 1024 tokens of KV")
    capacity = int(room / kv_bytes)
    return CostModel(
        name=name,
        source=f"roofline: {BANDWIDTH_SHARE:.0%} of bandwidth, {COMPUTE_SHARE:.0%} of compute, as measured "
        "for LLaMA-7B on A10; no cost per request",
        fixed_ms=0.0,
        weights_ms=shape.parameters * BYTES / bytes_per_ms,
        token_ms=2 * shape.parameters / flops_per_ms,
        attention_ms=2 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim / flops_per_ms,
        request_ms=0.0,
        context_ms=kv_bytes / bytes_per_ms,
        mixed_ms=0.0,
        arrival_ms=0.0,
        answer_ms=0.0,
        end_ms=0.0,
        decode_spread=(),
        prefill_spread=(),
        copy_ms=kv_bytes / device.link_bytes_per_s * 1e3,
        serving_ms=0.0,
        capacity_tokens=capacity,
        max_model_len=min(capacity, shape.max_position_embeddings),
        layers=shape.num_hidden_layers,
        kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        dtype="bfloat16",
    )


def cost_model(name: str) -> CostModel:
    """By name: a preset, a file.json, or ``model@device`` where the model may be a config.json."""
    if name == LLAMA_7B_A10.name:
        return LLAMA_7B_A10
    model, at, device_name = name.partition("@")
    if not at and name.endswith(".json"):
        return read_cost_model(Path(name))
    device = DEVICES.get(device_name)
    if not at or device is None:
        known = f"{LLAMA_7B_A10.name}, FILE.json, MODEL@DEVICE with devices {', '.join(DEVICES)}"
        raise ConfigurationError(f"unknown cost model {name!r}; there are {known}")
    shape = read_shape(Path(model)) if model.endswith(".json") else MODELS.get(model)
    if shape is None:
        raise ConfigurationError(f"unknown model {model!r}; there are {', '.join(MODELS)}, or a config.json")
    return roofline(name, shape, device)
