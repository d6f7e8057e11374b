"""The fairness benchmark's load: every answer is complete, prompts grow with the conversation, and swapping
changes when tokens come but not which."""

import pytest

from llumnix.bench.conversations import ConversationLoad, Seen
from llumnix.core.config import EngineConfig, SwapConfig
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.swap import SwapDirection
from llumnix.sim.cost import LLAMA_7B_A10
from llumnix.sim.swap import HOST_LINKS
from llumnix.sim.virtual_engine import VirtualExecutor, VirtualTime
from llumnix.sim.workload import Arrival, Turn

TALKS = [Arrival(0.1 * number, 300, 60, turns=(Turn(1.0, 40, 50), Turn(1.0, 40, 30))) for number in range(8)]
ENGINE = EngineConfig(kv_blocks=100, batch_max=8)


def load(swap: SwapConfig) -> tuple[Seen, VirtualExecutor]:
    clock = VirtualTime()
    executor = VirtualExecutor(LLAMA_7B_A10, ENGINE, swap, HOST_LINKS["pcie4"], clock)
    engine = InProcessEngine(executor, ENGINE, swap=swap)
    seen = ConversationLoad(TALKS, vocabulary=256, seed=3).run(engine, clock, clock.sleep_until)
    engine.check()
    return seen, executor


@pytest.mark.parametrize("host_blocks", [0, 400])
def test_every_turn_is_answered_in_full(host_blocks: int) -> None:
    seen, executor = load(SwapConfig(host_blocks=host_blocks, rerank_frequency=0.1, rerank_by="random"))
    assert len(seen.ttft_s) == 24 and seen.tokens == 8 * 140 == len(seen.ttft_s) + len(seen.gaps_s)
    assert seen.prompt_tokens == 8 * (300 + 400 + 490)
    assert min(seen.ttft_s) > 0 and seen.seconds >= seen.step_s > 0
    assert bool(executor.copier.totals()[SwapDirection.IN].jobs) == bool(host_blocks)


def test_the_same_load_is_the_same_run() -> None:
    swap = SwapConfig(host_blocks=400, rerank_frequency=0.04, rerank_by="markov")
    assert load(swap)[0] == load(swap)[0]
