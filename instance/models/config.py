"""A model's shape, read from its config.json.

Reading is strict: whatever would make the decoder compute something else than the model's authors meant
(another architecture, another rope scaling, quantized weights, …) is refused by name. The decoder then never
looks at the architecture again; everything it needs is a field here. No torch, so frontends may use it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llumnix.core.errors import ConfigurationError

DTYPE_NAMES: Final = ("float32", "bfloat16", "float16")
ROPE_SCALINGS: Final = ("default", "linear", "llama3")
ROPE_THETA_DEFAULT: Final = 10_000.0
MISTRAL_WINDOW_DEFAULT: Final = 4096  # what an absent key means to transformers

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What an architecture's name alone decides. ``qkv_bias`` and ``output_bias`` None: config.json says
    it."""

    qkv_bias: bool | None
    output_bias: bool | None
    qk_norm: bool


ARCHITECTURES: Final = {
    "LlamaForCausalLM": Architecture(qkv_bias=None, output_bias=None, qk_norm=False),
    "MistralForCausalLM": Architecture(qkv_bias=False, output_bias=False, qk_norm=False),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, output_bias=False, qk_norm=False),
    "Qwen3ForCausalLM": Architecture(qkv_bias=None, output_bias=None, qk_norm=True),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions. ``factor`` counts for linear and llama3 scaling, the last three for llama3 only."""

    theta: float = ROPE_THETA_DEFAULT
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model. ``max_len`` is the longest sequence its positions allow; ``sliding_window``, if
    not None, the longest one over which its attention is still plain causal attention."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_len: int
    dtype: str = "bfloat16"
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    def usable_len(self, wanted: int) -> int:
        """Longest prompt + output to serve; ``wanted`` 0 takes the most that is exact."""
        limit = self.max_len if self.sliding_window is None else min(self.max_len, self.sliding_window)
        if wanted <= limit:
            return wanted or limit
        reason = f"the model's positions end at {self.max_len}"
        if limit < self.max_len:
            reason = (
                f"the model attends in a sliding window of {limit}, which is not supported beyond that length"
            )
        raise ConfigurationError(f"max_model_len must be at most {limit}, got {wanted}: {reason}")


def parse_config(raw: Json) -> ModelConfig:
    """A config.json's content as ModelConfig. Raises ConfigurationError naming what is not supported."""
    name = _architecture_name(raw)
    architecture = ARCHITECTURES[name]
    _refuse_unsupported(raw)
    bias = bool(raw.get("attention_bias", False))
    heads = _positive(raw, "num_attention_heads")
    kv_heads = _positive(raw, "num_key_value_heads", heads if name == "LlamaForCausalLM" else None)
    hidden_size = _positive(raw, "hidden_size")
    head_dim = _positive(raw, "head_dim", 128 if name == "Qwen3ForCausalLM" else hidden_size // heads)
    if heads % kv_heads:
        raise ConfigurationError(
            f"config.json: {heads} attention heads cannot share {kv_heads} KV heads evenly"
        )
    if head_dim % 2:
        raise ConfigurationError(f"config.json: head_dim must be even, got {head_dim}")
    max_len = _positive(raw, "max_position_embeddings")
    return ModelConfig(
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(raw, "intermediate_size"),
        layers=_positive(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_len=max_len,
        dtype=_dtype(raw),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw, max_len),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias if architecture.qkv_bias is None else architecture.qkv_bias,
        output_bias=bias if architecture.output_bias is None else architecture.output_bias,
        qk_norm=architecture.qk_norm,
        sliding_window=_sliding_window(raw, name),
    )


def _architecture_name(raw: Json) -> str:
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if name not in ARCHITECTURES:
        found = name or raw.get("model_type") or "none"
        raise ConfigurationError(
            f"config.json: architecture {found} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return str(name)


def _refuse_unsupported(raw: Json) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigurationError(
            f"config.json: hidden_act {raw['hidden_act']!r} is not supported; supported: silu"
        )
    if raw.get("mlp_bias", False):
        raise ConfigurationError("config.json: mlp_bias is not supported")
    if raw.get("quantization_config") is not None:
        raise ConfigurationError("config.json: quantized weights are not supported")


def _positive(raw: Json, key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"config.json: {key} must be a positive whole number, got {value!r}")
    return value


def _number(section: Json, key: str) -> float:
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigurationError(f"config.json: rope {key} must be a positive number, got {value!r}")
    return float(value)


def _dtype(raw: Json) -> str:
    """Newer files say ``dtype``, older ones ``torch_dtype``."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    if name not in DTYPE_NAMES:
        raise ConfigurationError(
            f"config.json: dtype {name!r} is not supported; supported: {', '.join(DTYPE_NAMES)}"
        )
    return str(name)


def _rope(raw: Json, max_len: int) -> RopeConfig:
    """Newer files keep all of it in ``rope_parameters``, older ones in ``rope_theta`` and
    ``rope_scaling``."""
    section = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(section, Mapping):
        raise ConfigurationError("config.json: rope parameters must be an object")
    if any(isinstance(value, Mapping) for value in section.values()):
        raise ConfigurationError("config.json: rope parameters that differ between layers are not supported")
    for partial in (section.get("partial_rotary_factor"), raw.get("partial_rotary_factor")):
        if partial not in (None, 1, 1.0):
            raise ConfigurationError(f"config.json: partial_rotary_factor {partial} is not supported")
    theta = _number(
        {"theta": section.get("rope_theta") or raw.get("rope_theta") or ROPE_THETA_DEFAULT}, "theta"
    )
    scaling = section.get("rope_type") or section.get("type") or "default"
    if scaling == "default":
        return RopeConfig(theta=theta)
    if scaling == "linear":
        return RopeConfig(theta=theta, scaling=scaling, factor=_number(section, "factor"))
    if scaling == "llama3":
        return RopeConfig(
            theta=theta,
            scaling=scaling,
            factor=_number(section, "factor"),
            low_freq_factor=_number(section, "low_freq_factor"),
            high_freq_factor=_number(section, "high_freq_factor"),
            original_max_len=_positive(section, "original_max_position_embeddings", max_len),
        )
    raise ConfigurationError(
        f"config.json: rope scaling {scaling!r} is not supported; supported: {', '.join(ROPE_SCALINGS)}"
    )


def _sliding_window(raw: Json, name: str) -> int | None:
    """The window if any layer really slides. Qwen models carry a window that ``use_sliding_window`` turns
    off."""
    if name == "LlamaForCausalLM":
        return None
    if name == "MistralForCausalLM":
        window = raw.get("sliding_window", MISTRAL_WINDOW_DEFAULT)
    else:
        window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
        kinds = raw.get("layer_types")
        first_sliding = raw.get("max_window_layers", 28)
        full = "sliding_attention" not in kinds if kinds else first_sliding >= raw["num_hidden_layers"]
        if full:
            return None
    return None if window is None else _positive({"sliding_window": window}, "sliding_window")
