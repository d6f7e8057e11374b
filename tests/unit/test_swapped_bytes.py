"""An engine that swaps all the time, over real pools and a real copier: whoever attends to KV that came back
finds what its tokens left there (the executor checks), and every token is what an undisturbed run gives."""

import time
from dataclasses import replace

import pytest
from engine_driving import Client, spec, undisturbed

from llumnix.bench.fairness_runs import VARIANTS
from llumnix.core.config import EngineConfig, SchedulerConfig, SwapConfig
from llumnix.core.messages.serving import RequestSpec
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.real_time_simulated_executor import RealTimeSimulatedExecutor
from llumnix.instance.swap import SwapDirection
from llumnix.instance.swap_lane import SwapLane

ENGINE = EngineConfig(
    kind="simulated",
    block_size=4,
    kv_blocks=32,
    step_tokens_max=32,
    batch_max=8,
    simulated_step_ms=0.0,
    simulated_token_ms=0.0,
)


def requests() -> list[RequestSpec]:
    return [spec(f"r{number}", prompt_len=9 + number, max_tokens=24) for number in range(9)]


def run(swap: SwapConfig) -> RealTimeSimulatedExecutor:
    """Everything to its end; checked after every step."""
    executor = RealTimeSimulatedExecutor(ENGINE, "swapped-bytes", swap)
    engine = InProcessEngine(executor, ENGINE, swap=swap)
    engine.configure(SchedulerConfig(preemption_policy="swap"))
    client = Client()
    for request in requests():
        assert engine.submit(request, 0.0) is None
    while engine.has_work():
        client.take(engine.step(time.perf_counter))
        engine.check()
    for request in requests():
        assert tuple(client.tokens[request.request_id]) == undisturbed(request)
    return executor


@pytest.mark.parametrize(
    ("variant", "host_blocks"), [(variant, 400) for variant in VARIANTS] + [("+ ahead (all)", 30)]
)
def test_kv_comes_back_as_it_went(variant: str, host_blocks: int) -> None:
    swap = replace(VARIANTS[variant], host_blocks=host_blocks, rerank_frequency=0.5, rerank_by="random")
    executor = run(swap)
    assert executor.copier is not None
    totals = executor.copier.totals()
    assert totals[SwapDirection.IN].jobs > 5 and totals[SwapDirection.OUT].errors == 0
    executor.close()


@pytest.mark.parametrize("direction", SwapDirection)
def test_copies_that_fail_cost_time_and_no_token(
    direction: SwapDirection, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, seen = SwapLane.copy, [0]

    def fails_often(self: SwapLane, job: object) -> None:
        seen[0] += self.direction is direction
        if self.direction is direction and seen[0] % 3 == 0:
            raise RuntimeError("no")
        copy(self, job)  # type: ignore[arg-type]

    monkeypatch.setattr(SwapLane, "copy", fails_often)
    executor = run(SwapConfig(host_blocks=400, rerank_frequency=0.5, rerank_by="random"))
    assert executor.copier is not None and executor.copier.totals()[direction].errors > 0
    executor.close()
