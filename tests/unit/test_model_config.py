"""config.json is read strictly: every supported spelling, and a refusal by name for everything else."""

from typing import Any

import pytest

from llumnix.core.errors import ConfigurationError
from llumnix.instance.models.config import ModelConfig, RopeConfig, parse_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}


def parsed(**changes: Any) -> ModelConfig:
    return parse_config(LLAMA | changes)


def test_llama() -> None:
    assert parsed() == ModelConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        max_len=4096,
        dtype="bfloat16",
        norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0),
    )
    no_kv_heads = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert parse_config(no_kv_heads).kv_heads == 4
    assert parsed(tie_word_embeddings=True).tied_embeddings
    assert parsed(head_dim=32).head_dim == 32
    assert parsed(head_dim=None).head_dim == 16


@pytest.mark.parametrize(
    ("name", "asked", "qkv", "output", "norm"),
    [
        ("LlamaForCausalLM", True, True, True, False),
        ("MistralForCausalLM", True, False, False, False),
        ("Qwen2ForCausalLM", False, True, False, False),
        ("Qwen3ForCausalLM", False, False, False, True),
        ("Qwen3ForCausalLM", True, True, True, True),
    ],
)
def test_what_the_architecture_decides(name: str, asked: bool, qkv: bool, output: bool, norm: bool) -> None:
    config = parsed(architectures=[name], attention_bias=asked)
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == (qkv, output, norm)


def test_unsupported_architectures_are_told_what_is_supported() -> None:
    for changes in ({"architectures": ["GPT2LMHeadModel"]}, {"architectures": None, "model_type": "gpt2"}):
        with pytest.raises(ConfigurationError, match=r"(GPT2LMHeadModel|gpt2) is not supported") as caught:
            parsed(**changes)
        for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
            assert name in str(caught.value)


def test_rope_in_old_and_new_spelling() -> None:
    llama3 = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 2048)
    assert parsed(rope_scaling=LLAMA3_SCALING).rope == llama3
    assert parsed(rope_theta=None, rope_parameters=LLAMA3_SCALING | {"rope_theta": 500000.0}).rope == llama3
    linear = RopeConfig(500000.0, "linear", 2.0)
    assert parsed(rope_scaling={"type": "linear", "factor": 2.0}).rope == linear
    assert parsed(rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope == RopeConfig(7.0)
    assert parsed(rope_scaling=None, rope_theta=None).rope == RopeConfig(10000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'.*default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'.*default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"torch_dtype": "float64"}, "float64"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"head_dim": 15}, "even"),
    ],
)
def test_refusals_name_the_setting(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parsed(**changes)


def test_dtype_in_old_and_new_spelling() -> None:
    assert parsed(dtype="float16").dtype == "float16"
    assert parsed(torch_dtype="float32").dtype == "float32"
    assert parsed(torch_dtype=None).dtype == "bfloat16"


def test_sliding_windows_bound_the_length() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}
    assert parsed(**mistral).sliding_window == 4096  # an absent key means so
    assert parsed(**mistral, sliding_window=None).sliding_window is None
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 1024}
    assert parsed(**qwen, use_sliding_window=False).sliding_window is None
    assert parsed(**qwen, use_sliding_window=True, max_window_layers=2).sliding_window is None
    assert parsed(**qwen, use_sliding_window=True, layer_types=["full_attention"] * 2).sliding_window is None
    sliding = parsed(**qwen, use_sliding_window=True, max_window_layers=1)
    assert sliding.sliding_window == 1024
    assert sliding.usable_len(0) == 1024 and sliding.usable_len(1000) == 1000
    with pytest.raises(ConfigurationError, match=r"max_model_len must be at most 1024.*sliding window"):
        sliding.usable_len(1025)


def test_usable_length_ends_with_the_positions() -> None:
    assert parsed().usable_len(0) == 4096
    with pytest.raises(ConfigurationError, match="at most 4096"):
        parsed().usable_len(4097)
