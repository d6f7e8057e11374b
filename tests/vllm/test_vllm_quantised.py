"""Quantised weights, int8 as compressed-tensors writes them and 8-bit floats that vLLM makes at start: it
computes with them as they are, and moves do not notice, nor that there are two ranks at one end."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_vllm_engine import PROMPT, Run, spec

from llumnix.bench.migration_processes import llama_json
from llumnix.core.config import EngineConfig, MigrationConfig
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.vllm_engine import VllmEngine
from llumnix.migration.transports import inprocess
from llumnix.migration.transports.factory import Readers
from llumnix.runtime.instance_factory import kv_endpoint

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
BY_ROW = INT8 | {"strategy": "token", "dynamic": True}
FIXED = INT8 | {"strategy": "tensor", "dynamic": False}
"""How activations are scaled. By row, each rank goes by its own part of it, so two ranks round unlike one."""
FIXED_SCALE = 0.04


def quantization(activations: dict[str, Any]) -> dict[str, Any]:
    weights = INT8 | {"strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def write_model(folder: Path, activations: dict[str, Any] = BY_ROW) -> None:
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
            if activations is FIXED:
                weights[f"{stem}.{name}.input_scale"] = torch.tensor([FIXED_SCALE])
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{stem}.{name}.weight"] = torch.ones(hidden)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = llama_json(SHAPE) | {"quantization_config": quantization(activations), "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def write_plain_model(folder: Path) -> None:
    """What vLLM makes weights up for."""
    (folder / "config.json").write_text(json.dumps(llama_json(SHAPE)))


def settings(folder: Path, dtype: str, more: str = "", degree: int = 1) -> EngineConfig:
    return EngineConfig(
        kind="vllm",
        model=str(folder),
        device="cpu",
        dtype=dtype,
        kv_blocks=20,
        max_model_len=256,
        staging_gib=0.05,
        threads=degree,
        tensor_parallel=degree,
        engine_args="enforce_eager=true;block_size=32;enable_prefix_caching=false" + more,
    )


def formats(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """Of what linear layers have of their weights. A kernel may keep the weights themselves elsewhere."""
    tensors = model.state_dict().items()
    return {name.rpartition(".")[2]: tensor.dtype for name, tensor in tensors if "_proj." in name}


@pytest.mark.parametrize(
    ("write", "arguments", "dtype"),
    [
        (write_model, "", torch.int8),
        pytest.param(
            write_plain_model,
            ";load_format=dummy;quantization=fp8_per_block",
            torch.float8_e4m3fn,
            marks=pytest.mark.skipif(
                not torch.cpu._is_amx_tile_supported(), reason="vLLM computes with these in AMX tiles only"
            ),
        ),
    ],
)
def test_a_request_over_quantised_weights_leaves_and_enters_again(
    tmp_path: Path, write: Callable[[Path], None], arguments: str, dtype: torch.dtype
) -> None:
    write(tmp_path)
    engine = VllmEngine(settings(tmp_path, "bfloat16", arguments), "test-quantised")
    try:
        found = engine._core._vllm.apply_model(formats)[0]
        assert found.get("weight", dtype) is dtype
        assert any(name.startswith("weight_scale") for name in found)
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


def move(name: str, source: VllmEngine, target: VllmEngine) -> None:
    inprocess.offer(source.pool)
    readers = target.readers(Readers(target.pool, MigrationConfig(transport="inprocess")))
    reader = readers.open(kv_endpoint(source.pool, ""))
    assert source.begin_move(name) == ""
    state, moving = source.take_out(name), source.spec_of(name, 0.0)
    reserved = target.reserve("m", len(state.blocks))
    assert reserved is not None and len(reserved) == len(state.blocks) > 0
    reader.read(state.blocks, reserved, 1.0, urgent=True)
    source.release(name)
    source.end_move(name)
    assert target.adopt("m", replace(moving, epoch=next(EPOCHS)), state.computed_tokens, 0.0) is None


def test_a_request_over_int8_weights_moves_between_one_rank_and_two(tmp_path: Path) -> None:
    write_model(tmp_path, FIXED)
    configs = [settings(tmp_path, "float32", degree=n) for n in (1, 2)]
    one, two = (VllmEngine(config, f"test-{os.getpid()}-{n}") for n, config in enumerate(configs))
    try:
        undisturbed = Run(one, spec("a", PROMPT, max_tokens=60)).out()["a"]
        run = Run(one, spec("b", PROMPT, max_tokens=60))
        for source, target in ((one, two), (two, one), (one, two)):
            run.step(9)
            move("b", source, target)
            run.engine = target
        assert run.out()["b"] == undisturbed
        assert not one.has_work()
    finally:
        two.close()
        one.close()
