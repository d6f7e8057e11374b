"""The engine benchmark beside vLLM: ratios are of the same work, a missing vLLM is told in plain words."""

import sys
import time
from collections.abc import Callable

import click
import numpy as np
import pytest
from test_torch_executor import MODEL

from llumnix.bench import vllm_layer
from llumnix.bench.engine import WARMUP_STEPS, _Bench
from llumnix.bench.engine_comparison import measure_vllm, with_ratios
from llumnix.core.config import EngineConfig
from llumnix.core.errors import TransportError
from llumnix.instance.engine import StepResult
from llumnix.instance.torch_executor import TorchExecutor


def test_ratios_compare_the_same_work() -> None:
    ours = [
        {"batch": 1, "prompt_tokens": 16, "tokens_per_s": 30.0},
        {"batch": 8, "prompt_tokens": 16, "tokens_per_s": 90.0},
        {"batch": 8, "prompt_tokens": 256, "tokens_per_s": 70.0},
    ]
    theirs = [
        {"batch": 8, "prompt_tokens": 256, "tokens_per_s": 140.0},
        {"batch": 8, "prompt_tokens": 16, "tokens_per_s": 30.0},
    ]
    assert [row["ratio"] for row in with_ratios(ours, theirs)] == [0.5, 3.0]
    prefill = with_ratios(
        [{"prompt_tokens": 128, "tokens_per_s": 9.0}], [{"prompt_tokens": 128, "tokens_per_s": 6.0}]
    )
    assert prefill == [{"prompt_tokens": 128, "tokens_per_s": 6.0, "ratio": 1.5}]


def test_an_interpreter_that_is_not_there_is_refused() -> None:
    with pytest.raises(click.ClickException, match="cannot run /nowhere/python"):
        measure_vllm("/nowhere/python", {})


def test_a_failing_run_says_why() -> None:
    with pytest.raises(click.ClickException, match="KeyError: 'kv_gib'"):
        measure_vllm(sys.executable, {"threads": 2})


def test_a_vllm_that_cannot_start_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be waited for until START_TIMEOUT_S."""
    monkeypatch.setattr(vllm_layer, "START_TIMEOUT_S", 60.0)
    begun = time.monotonic()
    with pytest.raises(TransportError, match="plain vLLM has ended"):
        vllm_layer._Plain(EngineConfig(kind="vllm", model="/nowhere"), 100, 2, 0)
    assert time.monotonic() - begun < 50.0


def test_every_step_that_counts_is_one_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that prefilled first ended before the last steps: fewer rows, called the whole batch's."""
    batch, steps = 6, 4
    config = EngineConfig(device="cpu", block_size=4, kv_blocks=96, step_tokens_max=8)
    executor = TorchExecutor.from_random(MODEL, config, seed=0, pool_name="unit-bench")
    bench = _Bench(executor, config, np.random.default_rng(0))
    step, tokens = bench.engine.step, list[int]()

    def counted(clock: Callable[[], float]) -> StepResult:
        result = step(clock)
        tokens.append(sum(len(delta.tokens) for deltas in result.deltas.values() for delta in deltas))
        return result

    monkeypatch.setattr(bench.engine, "step", counted)
    try:
        bench.decode(batch, 10, steps)
    finally:
        executor.close()
    assert tokens[-(WARMUP_STEPS + 2 * steps) :] == [batch] * (WARMUP_STEPS + 2 * steps)
