"""The torch executor's own rules: limits agree with model and pool, and a plan must be backed by blocks."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError, InvariantError
from llumnix.core.sampling import SamplingParams
from llumnix.instance.executor import Chunk, StepPlan
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.request import Request
from llumnix.instance.torch_executor import TorchExecutor

MODEL = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, layers=1, heads=2, kv_heads=1, head_dim=8, max_len=64
)
CONFIG = EngineConfig(device="cpu", block_size=4, kv_blocks=10)


def build(config: EngineConfig) -> TorchExecutor:
    return TorchExecutor.from_random(MODEL, config, seed=0, pool_name="unit-executor")


def request(tokens: list[int], blocks: list[int]) -> Request:
    sampling = SamplingParams(max_tokens=5, seed=0, temperature=0.0)
    return Request("r7", 0, "", sampling, 0, 0, "", 0.0, tokens, len(tokens), blocks=blocks)


@pytest.fixture
def executor() -> Iterator[TorchExecutor]:
    built = build(CONFIG)
    yield built
    built.close()


def test_limits(executor: TorchExecutor) -> None:
    assert executor.max_model_len == 40  # the pool, not the model's 64
    assert executor.kv_layout.blocks == 10 and executor.kv_layout.dtype == "bfloat16"
    assert executor.vocab_size == 50 and executor.eos_token_ids == frozenset()


@pytest.mark.parametrize(
    ("max_model_len", "message"), [(65, "at most 64"), (48, "over the pool's 40 tokens")]
)
def test_a_length_that_cannot_be_served_is_refused(max_model_len: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(replace(CONFIG, max_model_len=max_model_len))


def test_dtype_can_be_chosen() -> None:
    executor = build(replace(CONFIG, dtype="float32"))
    assert executor.kv_layout.dtype == "float32"
    executor.close()


def test_only_sampling_chunks_give_tokens(executor: TorchExecutor) -> None:
    first, second = request([1, 2, 3], [0]), request([4, 5, 6, 7, 8], [1, 2])
    assert executor.execute(StepPlan(())) == []
    assert executor.execute(StepPlan((Chunk(second, 0, 3, False),))) == []
    assert len(executor.execute(StepPlan((Chunk(first, 0, 3, True), Chunk(second, 3, 1, False))))) == 1


@pytest.mark.parametrize(("start", "count"), [(4, 1), (3, 2)])
def test_a_plan_beyond_a_requests_blocks_is_a_bug(executor: TorchExecutor, start: int, count: int) -> None:
    short = request([1, 2, 3, 4, 5], [0])
    with pytest.raises(InvariantError, match="r7 has 1 blocks where a step needs 2"):
        executor.execute(StepPlan((Chunk(short, start, count, True),)))
