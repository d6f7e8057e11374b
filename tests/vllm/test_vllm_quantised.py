"""Quantised weights, int8 as compressed-tensors writes them and 8-bit floats that vLLM makes at start: it
computes with them as they are, and moves do not notice."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_vllm_engine import PROMPT, Run, spec

from llumnix.bench.migration_processes import llama_json
from llumnix.core.config import EngineConfig
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.vllm_engine import VllmEngine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

EPOCHS = count(1_000)
SHAPE = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=64,
    max_len=1024,
    tied_embeddings=True,
)
INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


def write_model(folder: Path) -> None:
    """A Llama of random weights, its linear layers in int8 with a scale for each row."""
    draw = torch.Generator().manual_seed(1)
    hidden, inner = SHAPE.hidden_size, SHAPE.intermediate_size
    shapes = {
        **{f"self_attn.{name}_proj": (SHAPE.heads * SHAPE.head_dim, hidden) for name in "qo"},
        **{f"self_attn.{name}_proj": (SHAPE.kv_heads * SHAPE.head_dim, hidden) for name in "kv"},
        **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
    }
    weights = {"model.embed_tokens.weight": torch.randn(SHAPE.vocab_size, hidden, generator=draw)}
    weights["model.norm.weight"] = torch.ones(hidden)
    for layer in range(SHAPE.layers):
        stem = f"model.layers.{layer}"
        for name, (rows, columns) in shapes.items():
            values = torch.randint(-127, 128, (rows, columns), generator=draw, dtype=torch.int8)
            weights[f"{stem}.{name}.weight"] = values
            weights[f"{stem}.{name}.weight_scale"] = torch.rand(rows, 1, generator=draw) * 0.002
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{stem}.{name}.weight"] = torch.ones(hidden)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = llama_json(SHAPE) | {"quantization_config": QUANTIZATION, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def write_plain_model(folder: Path) -> None:
    """What vLLM makes weights up for."""
    (folder / "config.json").write_text(json.dumps(llama_json(SHAPE)))


@pytest.mark.parametrize(
    ("write", "arguments", "dtype"),
    [
        (write_model, "", torch.int8),
        (write_plain_model, ";load_format=dummy;quantization=fp8_per_block", torch.float8_e4m3fn),
    ],
)
def test_a_request_over_quantised_weights_leaves_and_enters_again(
    tmp_path: Path, write: Callable[[Path], None], arguments: str, dtype: torch.dtype
) -> None:
    write(tmp_path)
    config = EngineConfig(
        kind="vllm",
        model=str(tmp_path),
        device="cpu",
        dtype="bfloat16",
        kv_blocks=20,
        max_model_len=256,
        staging_gib=0.05,
        threads=1,
        engine_args="enforce_eager=true;block_size=32;enable_prefix_caching=false" + arguments,
    )
    engine = VllmEngine(config, "test-quantised")
    try:
        assert dtype in engine._core._vllm.apply_model(formats)[0]
        undisturbed = Run(engine, spec("a", PROMPT)).out()["a"]
        run = Run(engine, spec("b", PROMPT))
        for _ in range(4):
            run.step(4)
            assert engine.begin_move("b") == ""
            engine.take_out("b")
            engine.put_back("b", next(EPOCHS))
            engine.end_move("b")
        assert run.out()["b"] == undisturbed
    finally:
        engine.close()


def formats(model: torch.nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in model.state_dict().values()}
