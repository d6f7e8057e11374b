"""The engine benchmark beside vLLM: ratios are of the same work, a missing vLLM is told in plain words."""

import sys

import click
import pytest

from llumnix.bench.engine_comparison import measure_vllm, with_ratios


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
