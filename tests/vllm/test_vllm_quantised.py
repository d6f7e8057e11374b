"""Quantised weights, int8 as compressed-tensors writes them and 8-bit floats that vLLM makes at start: it
computes with them as they are, and moves do not notice, nor that there are two ranks at one end."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_vllm_engine import PROMPT, Run, spec
from transformers import LlamaConfig, LlamaForCausalLM

from llumnix.bench.migration_processes import llama_json
from llumnix.core.config import EngineConfig, MigrationConfig
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.vllm_engine import VllmEngine
from llumnix.migration.transports import inprocess
from llumnix.migration.transports.factory import Readers
from llumnix.runtime.instance_factory import kv_endpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

EPOCHS = count(1_000)
NEAR = 0.1
"""Of two logarithms of probabilities."""
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
    """What vLLM itself quantises, by blocks of 128 rows: none of them belongs to two ranks."""
    torch.manual_seed(0)
    config = LlamaConfig.from_dict(llama_json(replace(SHAPE, head_dim=128)) | {"initializer_range": 0.2})
    LlamaForCausalLM(config).save_pretrained(folder)


def settings(folder: Path, dtype: str, more: str = "", degree: int = 1) -> EngineConfig:
    return EngineConfig(
        kind="vllm",
        model=str(folder),
        device="cpu",
        dtype=dtype,
        kv_blocks=40,
        max_model_len=256,
        staging_gib=0.05,
        threads=degree,
        tensor_parallel=degree,
        engine_args="enforce_eager=true;block_size=32;enable_prefix_caching=false" + more,
    )


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmEngine, VllmEngine]]:
    """Of one rank and of two."""
    folder, arguments = tmp_path_factory.mktemp("plain"), ";quantization=fp8_per_block"
    write_plain_model(folder)
    one = VllmEngine(settings(folder, "float16", arguments), "test-one")
    two = VllmEngine(settings(folder, "float16", arguments, degree=2), "test-two")
    yield one, two
    two.close()
    one.close()


def leaves_and_enters_again(engine: VllmEngine) -> None:
    undisturbed = Run(engine, spec("a", PROMPT)).out()["a"]
    run = Run(engine, spec("b", PROMPT))
    for _ in range(4):
        run.step(4)
        assert engine.begin_move("b") == ""
        engine.take_out("b")
        engine.put_back("b", next(EPOCHS))
        engine.end_move("b")
    assert run.out()["b"] == undisturbed


def formats(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """Of what linear layers have of their weights. A kernel may keep the weights themselves elsewhere."""
    tensors = model.state_dict().items()
    return {name.rpartition(".")[2]: tensor.dtype for name, tensor in tensors if "_proj." in name}


def test_a_request_over_int8_weights_leaves_and_enters_again(tmp_path: Path) -> None:
    write_model(tmp_path)
    engine = VllmEngine(settings(tmp_path, "bfloat16"), "test-quantised")
    try:
        found = engine._core._vllm.apply_model(formats)[0]
        assert "weight_scale" in found and found.get("weight", torch.int8) is torch.int8
        leaves_and_enters_again(engine)
    finally:
        engine.close()


def test_a_request_over_8_bit_floats_leaves_and_enters_again(engines: tuple[VllmEngine, VllmEngine]) -> None:
    assert torch.float8_e4m3fn in engines[0]._core._vllm.apply_model(formats)[0].values()
    leaves_and_enters_again(engines[0])


def move(name: str, source: VllmEngine, target: VllmEngine) -> None:
    inprocess.offer(source.pool)
    readers = target.readers(Readers(target.pool, MigrationConfig(transport="inprocess")))
    reader = readers.open(kv_endpoint(source.pool, ""))
    assert source.begin_move(name) == ""
    state, moving = source.take_out(name), source.spec_of(name, 0.0)
    reserved = target.reserve(name, len(state.blocks))
    assert reserved is not None and len(reserved) == len(state.blocks) > 0
    reader.read(state.blocks, reserved, 1.0, urgent=True)
    source.release(name)
    source.end_move(name)
    assert target.adopt(name, replace(moving, epoch=next(EPOCHS)), state.computed_tokens, 0.0) is None


def alike(run: Run, name: str, other: list[int]) -> bool:
    """Whether another said what this one did, or else the second of two that were all but as likely: sums
    over ranks are rounded in another order."""
    said = run.said[name]
    place = next((n for n, (mine, its) in enumerate(zip(said, other, strict=True)) if mine != its), -1)
    first, second = run.logprobs[name][place].top
    return place < 0 or (other[place] == second[0] and first[1] - second[1] < NEAR)


def test_requests_over_8_bit_floats_move_between_one_rank_and_two(
    engines: tuple[VllmEngine, VllmEngine],
) -> None:
    one, two = engines
    specs = {name: PROMPT[first:] for name, first in zip("abcd", (10, 20, 30, 40))}
    still = Run(one, *(spec(name, prompt, max_tokens=40, logprobs=2) for name, prompt in specs.items()))
    still.out()
    run = Run(one, *(spec(name, prompt, max_tokens=40) for name, prompt in specs.items()))
    for source, target in ((one, two), (two, one), (one, two)):
        run.step(9)
        for name in specs:
            move(name, source, target)
        run.engine = target
    said = run.out()
    assert not one.has_work()
    assert all(alike(still, name, tokens) for name, tokens in said.items())
    assert any(still.said[name] == tokens for name, tokens in said.items())
