"""What a switch copies with and without reuse, and what the bookkeeping of swapping costs, for `bench swap`.

The engine core runs conversations under priority updates in virtual time, as in the fairness benchmark; how
long the core itself takes for a step is measured in real time, with the ledger, the host cache and the
copier's queue, and once more without host memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter

from llumnix.bench.conversations import ConversationLoad
from llumnix.bench.fairness_runs import ALL, ASYNC, HOST_GIB, REUSE, Scenario, simulated
from llumnix.core.config import SwapConfig
from llumnix.instance.engine import StepResult
from llumnix.instance.in_process_engine import InProcessEngine

MODEL = "qwen-2.5-32b@a100-80g"
REQUESTS = 500
NO_HOST = SwapConfig()


class TimedEngine(InProcessEngine):
    """Notes how long its steps take by a real clock."""

    core_s = 0.0

    def step(self, clock: Callable[[], float]) -> StepResult:
        """See InProcessEngine."""
        began = perf_counter()
        result = super().step(clock)
        self.core_s += perf_counter() - began
        return result


@dataclass(frozen=True, slots=True)
class Switches:
    """One run. ``core_us`` per step is measured; ``step_ms`` is virtual."""

    variant: str
    switches: int
    blocks_per_switch: float
    reused_blocks_per_switch: float
    core_us: float
    step_ms: float


def measure_switches(seed: int) -> list[Switches]:
    """Without reuse, with it, with everything, and without host memory."""
    variants = {
        "no reuse": ASYNC,
        "reuse": REUSE,
        "all": ALL,
        "no host memory": NO_HOST,
    }
    return [_run(name, swap, seed) for name, swap in variants.items()]


def _run(name: str, variant: SwapConfig, seed: int) -> Switches:
    scenario = Scenario(MODEL, 0.04, "random", name, "pcie4", 1.0, REQUESTS, seed)
    swapping = replace(
        variant,
        host_gib=0.0 if variant is NO_HOST else HOST_GIB,
        rerank_frequency=scenario.frequency,
        rerank_by=scenario.pattern,
    )
    engine, clock, arrivals = simulated(scenario, swapping, TimedEngine)
    assert isinstance(engine, TimedEngine)
    seen = ConversationLoad(arrivals, vocabulary=256, seed=seed).run(engine, clock, clock.sleep_until)
    swap = engine.load().swap
    switches = swap.swapped_out if swap else 0
    return Switches(
        variant=name,
        switches=switches,
        blocks_per_switch=swap.out_blocks / switches if swap and switches else 0.0,
        reused_blocks_per_switch=swap.reused_blocks / switches if swap and switches else 0.0,
        core_us=engine.core_s / seen.steps * 1e6,
        step_ms=seen.step_s / seen.steps * 1e3,
    )
