"""Weights that vLLM quantises when it starts: an argument of vLLM's own, which moves must not notice."""

from itertools import count

import pytest
from test_vllm_engine import PROMPT, Run, spec

from llumnix.core.config import EngineConfig
from llumnix.instance.vllm_engine import VllmEngine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

EPOCHS = count(1_000)


def test_a_request_over_quantised_weights_leaves_and_enters_again() -> None:
    config = EngineConfig(
        kind="vllm",
        model="smollm2",
        device="cpu",
        dtype="bfloat16",
        kv_blocks=20,
        max_model_len=256,
        staging_gib=0.05,
        threads=1,
        engine_args="enforce_eager=true;block_size=32;enable_prefix_caching=false"
        ";quantization=int8_per_channel_weight_only",
    )
    engine = VllmEngine(config, "test-quantised")
    try:
        layers = engine._core._vllm.apply_model(lambda model: {p.dtype for p in model.parameters()})
        assert "torch.int8" in str(layers)
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
