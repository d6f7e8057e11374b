"""A whole engine on a GPU: what it says does not depend on swapping, however often that happens and although
prefill steps, which sample nothing, are swapped out the moment they are over."""

import time

import pytest
import torch

from llumnix.core.config import EngineConfig, SchedulerConfig, SwapConfig
from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.messages.serving import RequestSpec
from llumnix.core.sampling import SamplingParams
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.swap import SwapDirection
from llumnix.instance.torch_executor import TorchExecutor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=32,
    max_len=1024,
)
REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 12, 120, 40
SWAPPING = {
    "all": SwapConfig(host_blocks=400, rerank_frequency=0.5, rerank_by="random"),
    "nothing kept": SwapConfig(
        host_blocks=400, rerank_frequency=0.5, rerank_by="random", swap_reuse=False, swap_ahead=False
    ),
    "piece by piece": SwapConfig(
        host_blocks=400, rerank_frequency=0.5, rerank_by="random", swap_copies="piece", block_groups=False
    ),
    "staged": SwapConfig(host_blocks=400, rerank_frequency=0.5, rerank_by="random", swap_copies="staging"),
}


def outputs(device: str, kv_blocks: int, swap: SwapConfig) -> tuple[dict[str, list[int]], int]:
    """Every request's tokens, and how many jobs were copied in."""
    config = EngineConfig(
        kind="torch", device=device, dtype="float32", kv_blocks=kv_blocks, batch_max=16, step_tokens_max=48
    )
    executor = TorchExecutor.from_random(MODEL, config, seed=1, pool_name="engine-gpu", swap=swap)
    engine = InProcessEngine(executor, config, swap=swap)
    engine.configure(SchedulerConfig(preemption_policy="swap"))
    tokens: dict[str, list[int]] = {f"r{number}": [] for number in range(REQUESTS)}
    for number, request_id in enumerate(tokens):
        spec = RequestSpec(
            request_id=request_id,
            epoch=FIRST_EPOCH,
            frontend_address="",
            prompt_tokens=tuple((number * 37 + at * at) % 512 for at in range(PROMPT_TOKENS + number)),
            output_tokens=(),
            sampling=SamplingParams(max_tokens=NEW_TOKENS, seed=number, temperature=0.0, ignore_eos=True),
            waited_s=0.0,
        )
        assert engine.submit(spec, 0.0) is None
    while engine.has_work():
        for deltas in engine.step(time.perf_counter).deltas.values():
            for delta in deltas:
                tokens[delta.request_id].extend(delta.tokens)
    engine.check()
    copier = executor.copier
    copied = 0 if copier is None else copier.totals()[SwapDirection.IN].jobs
    executor.close()
    return tokens, copied


@pytest.mark.parametrize("swapping", SWAPPING)
def test_tokens_are_those_of_an_engine_that_never_swaps(swapping: str) -> None:
    undisturbed, _ = outputs("cuda", 256, SwapConfig())
    swapped, copied = outputs("cuda", 40, SWAPPING[swapping])
    assert copied > REQUESTS
    assert swapped == undisturbed and all(len(said) == NEW_TOKENS for said in swapped.values())
