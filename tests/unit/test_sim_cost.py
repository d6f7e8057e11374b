"""Cost models: the published figures come back, rooflines agree with them, nonsense is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llumnix.core.errors import ConfigurationError
from llumnix.sim.cost import LLAMA_7B_A10, to_json
from llumnix.sim.roofline import DEVICES, MODELS, cost_model, roofline


@pytest.mark.parametrize(
    ("batch", "measured_ms"), [(32, 52.0), (16, 47.0), (8, 44.3), (4, 43.6), (2, 43.3), (1, 43.5)]
)
def test_decode_steps_are_those_of_figure_10(batch: int, measured_ms: float) -> None:
    assert LLAMA_7B_A10.step_s(batch, 8192, 0, 0) * 1e3 == pytest.approx(measured_ms, rel=0.03)


@pytest.mark.parametrize(
    ("tokens", "measured_ms"), [(256, 58), (512, 110), (1024, 220), (2048, 436), (4096, 940), (8192, 1995)]
)
def test_prefill_is_that_of_figure_10(tokens: int, measured_ms: float) -> None:
    assert LLAMA_7B_A10.step_s(0, 0, tokens, tokens**2) * 1e3 == pytest.approx(measured_ms, rel=0.08)


def test_a_prompt_in_chunks_costs_what_it_costs_at_once() -> None:
    whole = LLAMA_7B_A10.step_s(0, 0, 4096, 4096**2)
    chunks = sum(
        LLAMA_7B_A10.step_s(0, 0, 1024, (begin + 1024) ** 2 - begin**2) for begin in range(0, 4096, 1024)
    )
    assert chunks == pytest.approx(whole)


def test_stretches_of_decodes_cost_bit_for_bit_what_single_steps_do() -> None:
    ends, durations = LLAMA_7B_A10.decode_steps(7, 900, begin=3.0, until=4.0, most=99, slowness=1.5)
    assert durations == [LLAMA_7B_A10.step_s(7, 900 + 7 * step, 0, 0) * 1.5 for step in range(len(ends))]
    assert ends[-2] < 4.0 <= ends[-1] and ends[0] == 3.0 + durations[0]
    assert len(LLAMA_7B_A10.decode_steps(7, 900, begin=3.0, until=9.0, most=4, slowness=1.0)[0]) == 4


def test_copying_kv_costs_its_tokens() -> None:
    assert LLAMA_7B_A10.copy_s(blocks=64, block_size=16) == pytest.approx(0.2048)
    assert LLAMA_7B_A10.layout(16).block_bytes == 16 * 524_288
    assert LLAMA_7B_A10.layout(16).blocks == 851


def test_the_roofline_of_the_measured_pair_is_what_was_measured() -> None:
    model = roofline("x", MODELS["llama-7b"], DEVICES["a10"])
    for name in ("weights_ms", "token_ms", "context_ms", "attention_ms"):
        assert getattr(model, name) == pytest.approx(getattr(LLAMA_7B_A10, name), rel=0.03), name


def test_faster_devices_are_faster_and_small_ones_refuse() -> None:
    slow, fast = cost_model("llama-3-8b@a10"), cost_model("llama-3-8b@h100-80g")
    assert fast.step_s(8, 8000, 0, 0) < slow.step_s(8, 8000, 0, 0) / 3
    assert fast.capacity_tokens > 5 * slow.capacity_tokens
    with pytest.raises(ConfigurationError, match="no room"):
        cost_model("qwen-2.5-32b@a10")


@pytest.mark.parametrize("name", ["llama-9b@a10", "llama-7b@toaster", "nothing", "none.json"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError):
        cost_model(name)


def test_models_come_from_their_config(tmp_path: Path) -> None:
    config = {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    ours = cost_model(f"{path}@a10")
    assert replace(ours, name="") == replace(cost_model("smollm2-135m@a10"), name="")
    path.write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(ConfigurationError, match=r"config\.json: hidden_size must be"):
        cost_model(f"{path}@a10")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weights_ms": 0}, r"cost.json: line 5: .*weights_ms must be above 0"),
        ({"fixed_ms": -1}, r"line 4: .*fixed_ms must be at least 0"),
        ({"copy_ms": float("nan")}, r"line 11: .*copy_ms must be at least 0"),
        ({"token_ms": "fast"}, "token_ms must be a number"),
        ({"capacity_tokens": 1.5}, "capacity_tokens must be a whole number"),
        ({"dtype": "int4"}, "dtype must be"),
        ({"extra": 1}, r"line 19: unknown field extra"),
    ],
)
def test_files_that_make_no_sense_are_refused(
    tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    path = tmp_path / "cost.json"
    path.write_text(to_json(LLAMA_7B_A10))
    assert cost_model(str(path)) == LLAMA_7B_A10
    path.write_text(json.dumps({**asdict(LLAMA_7B_A10), **change}, indent=2))
    with pytest.raises(ConfigurationError, match=complaint):
        cost_model(str(path))
    values = asdict(LLAMA_7B_A10)
    del values["copy_ms"]
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigurationError, match="copy_ms is missing"):
        cost_model(str(path))
