"""Cost models: the published figures come back, rooflines agree with them, nonsense is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from llumnix.core.errors import ConfigurationError
from llumnix.sim.cost import LLAMA_7B_A10, to_json
from llumnix.sim.roofline import DEVICES, MODELS, cost_model, roofline
from llumnix.sim.spread import SPREAD_SHARES, Scatter, at_share, spread_mean

POINTS = (0.7, 0.85, 0.9, 0.951, 1.0, 1.15, 1.5, 2.0, 2.4)


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


def test_a_pool_of_less_than_a_block_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="capacity_tokens 15 is less than a block of 16"):
        replace(LLAMA_7B_A10, capacity_tokens=15).layout(16)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weights_ms": 0}, r"cost.json: line 5: .*weights_ms must be above 0"),
        ({"fixed_ms": -1}, r"line 4: .*fixed_ms must be at least 0"),
        ({"arrival_ms": float("inf")}, r"line 11: .*arrival_ms must be at least 0"),
        ({"decode_spread": 1}, r"line 14: .*decode_spread must be a list of numbers"),
        ({"decode_spread": [1.0] * 8}, r"line 14: .*decode_spread must be empty or 9 numbers"),
        ({"decode_spread": [1.02, *[1.0] * 8]}, r"line 14: .*none smaller than the one before"),
        ({"decode_spread": [0.0, *[1.0] * 7, 6.0]}, "decode_spread must be empty or 9 numbers above 0"),
        ({"prefill_spread": [1.1] * 9}, r"line 15: .*prefill_spread must be .*whose mean is 1"),
        ({"prefill_spread": ["1"] * 9}, "prefill_spread must be empty or 9 numbers"),
        ({"copy_ms": float("nan")}, r"line 16: .*copy_ms must be at least 0"),
        ({"token_ms": "fast"}, "token_ms must be a number"),
        ({"capacity_tokens": 1.5}, "capacity_tokens must be a whole number"),
        ({"dtype": "int4"}, "dtype must be"),
        ({"extra": 1}, r"line 24: unknown field extra"),
    ],
)
def test_files_that_make_no_sense_are_refused(
    tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    path = tmp_path / "cost.json"
    for model in (LLAMA_7B_A10, replace(LLAMA_7B_A10, decode_spread=POINTS)):
        path.write_text(to_json(model))
        assert cost_model(str(path)) == model
    path.write_text(json.dumps({**asdict(LLAMA_7B_A10), **change}, indent=2))
    with pytest.raises(ConfigurationError, match=complaint):
        cost_model(str(path))
    values = asdict(LLAMA_7B_A10)
    del values["copy_ms"]
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigurationError, match="copy_ms is missing"):
        cost_model(str(path))


def test_a_spread_is_drawn_as_it_was_measured_and_leaves_the_mean_alone() -> None:
    assert spread_mean(POINTS) == pytest.approx(1.0)
    scatter = Scatter(POINTS, (), 0, "i0/p1")
    drawn = np.array([scatter.factor(step, prefills=False) for step in range(40_000)])
    assert drawn.mean() == pytest.approx(1.0, abs=0.005)
    assert np.quantile(drawn, SPREAD_SHARES) == pytest.approx(POINTS, rel=0.02)
    assert np.corrcoef(drawn[1:], drawn[:-1])[0, 1] == pytest.approx(0.0, abs=0.02)
    assert [at_share(POINTS, share) for share in SPREAD_SHARES[:-1]] == pytest.approx(POINTS[:-1])


def test_a_draw_hangs_on_seed_instance_and_step_alone() -> None:
    scatter = Scatter(POINTS, (1.0,) * 9, 7, "i0/p1")
    one_by_one = [scatter.factor(step, prefills=False) for step in (9, 8, 7, 6, 5)]
    assert one_by_one[::-1] == Scatter(POINTS, (), 7, "i0/p1").decodes(5, 5)
    assert scatter.decodes(5, 5) != Scatter(POINTS, (), 8, "i0/p1").decodes(5, 5)
    assert scatter.decodes(5, 5) != Scatter(POINTS, (), 7, "i1/p1").decodes(5, 5)
    assert scatter.factor(5, prefills=True) == 1.0
    nothing = Scatter((), POINTS, 7, "i0/p1")
    assert nothing.decodes(5, 5) == [] and nothing.factor(5, prefills=False) == 1.0


def test_stretches_of_scattering_decodes_cost_bit_for_bit_what_single_steps_do() -> None:
    model = replace(LLAMA_7B_A10, decode_spread=POINTS)
    factors = Scatter(POINTS, (), 0, "i0/p1").decodes(0, 99)
    ends, durations = model.decode_steps(7, 900, begin=3.0, until=4.0, most=99, slowness=1.5, factors=factors)
    assert durations == [
        model.step_s(7, 900 + 7 * step, 0, 0) * factors[step] * 1.5 for step in range(len(ends))
    ]
    assert ends[-2] < 4.0 <= ends[-1] and min(durations) >= model.least_step_s * 1.5
    assert model.least_step_s == pytest.approx(LLAMA_7B_A10.least_step_s * 0.7)
