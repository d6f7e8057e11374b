"""One run of the fairness benchmark: conversations on one engine, whose requests are ranked anew every so
many steps, with swapping as others do it or with some of our parts. Used by ``bench fairness`` and ``bench
swap``.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llumnix.bench.conversations import ConversationLoad
from llumnix.core.config import EngineConfig, SchedulerConfig, SwapConfig
from llumnix.instance.copy_ladder import CopyLadder
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.swap_copier import SwapCopier
from llumnix.instance.torch_executor import TorchExecutor
from llumnix.sim.roofline import cost_model
from llumnix.sim.swap import HOST_LINKS, LayerFirstLadder, VirtualCopier
from llumnix.sim.virtual_engine import VirtualExecutor, VirtualTime
from llumnix.sim.workload import Arrival, Conversations, Synthetic, Turn

HOST_GIB = 60e9 / (1 << 30)
TURNS_MEAN = 5.5
THINK_S = 5.0
CONTEXT_MAX = 4096

PLAIN = SwapConfig(
    block_groups=False, swap_copies="piece", swap_async=False, swap_reuse=False, swap_ahead=False
)
BATCHED = replace(PLAIN, swap_copies="run")
GROUPS = replace(BATCHED, block_groups=True, swap_copies="auto")
ASYNC = replace(GROUPS, swap_async=True)
REUSE = replace(ASYNC, swap_reuse=True)
ALL = replace(REUSE, swap_ahead=True)
VARIANTS = {
    "per block": PLAIN,
    "batched": BATCHED,
    "+ groups": GROUPS,
    "+ async": ASYNC,
    "+ reuse": REUSE,
    "+ ahead (all)": ALL,
    "all - groups": replace(ALL, block_groups=False),
    "all - async": replace(ALL, swap_async=False),
    "all - reuse": replace(ALL, swap_reuse=False),
}
"""The first six add up: each has everything the one before it has. The first copies each block's layers, keys
and values one by one and waits, as vLLM 0.3 did; the second hands all blocks over in one batch, but waits and
has them scattered. The others have everything but one part; ``+ reuse`` is the one without swap-ahead."""
LAYER_FIRST = {"batched, layer first": BATCHED, "all, layer first": ALL}
"""The same two over pools with a tensor per layer for keys and one for values; in virtual time only."""

CPU = "cpu"
CPU_MODEL = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=704,
    layers=4,
    heads=8,
    kv_heads=8,
    head_dim=64,
    max_len=8192,
)
"""A small Llama with much KV for its size, 8 KiB a token in bfloat16: a step of few ms is to copying a block
about what it is on a GPU."""
CPU_ENGINE = EngineConfig(
    kind="torch",
    device="cpu",
    kv_blocks=192,
    threads=1,
    batch_max=32,
    step_tokens_max=256,
    waiting_max=10_000,
)
"""One compute thread, so that a core is left for what a GPU's copy engines do."""
CPU_HOST_BLOCKS = 1024
CPU_SHRINK, CPU_THINK_S = 6.0, 0.2


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run. ``engine`` is a cost model's name, or ``cpu``; ``link`` is what a simulated one swaps over;
    ``rate`` in requests per second."""

    engine: str
    frequency: float
    pattern: str
    variant: str
    link: str
    rate: float
    requests: int
    seed: int


def conversations(scenario: Scenario, *, shrink: float, think_s: float, tokens_max: int) -> list[Arrival]:
    """Multi-turn conversations with ShareGPT's lengths divided by ``shrink``, mean pauses of ``think_s``."""
    drawn = Synthetic(
        "sharegpt",
        scenario.rate,
        scenario.requests,
        scenario.seed,
        tokens_max=int(tokens_max * shrink),
        conversations=Conversations(TURNS_MEAN, think_s),
    )
    return [
        replace(
            arrival,
            prompt_tokens=ceil(arrival.prompt_tokens / shrink),
            output_tokens=ceil(arrival.output_tokens / shrink),
            turns=tuple(
                Turn(turn.think_s, ceil(turn.new_tokens / shrink), ceil(turn.output_tokens / shrink))
                for turn in arrival.turns
            ),
        )
        for arrival in drawn.arrivals()
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one run came to. Seconds: of every turn until its first token, of every token since the one
    before. ``totals`` are counts and sums, which add up over runs."""

    scenario: Scenario
    ttft_s: NDArray[np.float32]
    gaps_s: NDArray[np.float32]
    totals: dict[str, float]


def run(scenario: Scenario) -> Outcome:
    """Do one."""
    variant = VARIANTS.get(scenario.variant) or LAYER_FIRST[scenario.variant]
    swap = replace(variant, rerank_frequency=scenario.frequency, rerank_by=scenario.pattern)
    if scenario.engine == CPU:
        return _run_real(scenario, replace(swap, host_blocks=CPU_HOST_BLOCKS))
    return _run_simulated(scenario, replace(swap, host_gib=HOST_GIB))


def pooled(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One row of the report from runs that differ in nothing that it says: all their waits together."""
    totals: dict[str, float] = {}
    for outcome in outcomes:
        for name, value in outcome.totals.items():
            totals[name] = totals.get(name, 0) + value
    return {
        **asdict(outcomes[0].scenario),
        "runs": len(outcomes),
        "ttft_count": sum(len(outcome.ttft_s) for outcome in outcomes),
        "tbt_count": sum(len(outcome.gaps_s) for outcome in outcomes),
        "ttft_ms": _tail([outcome.ttft_s for outcome in outcomes]),
        "tbt_ms": _tail([outcome.gaps_s for outcome in outcomes]),
        "tokens_per_s": totals["tokens"] / totals["seconds"],
        "step_ms_mean": totals["step_s"] / totals["steps"] * 1e3,
        "blocks_per_switch": totals["out_blocks"] / max(1, totals["swapped_out"]),
        **totals,
    }


def simulated(
    scenario: Scenario, swap: SwapConfig, engine_type: type[InProcessEngine] = InProcessEngine
) -> tuple[InProcessEngine, VirtualTime, list[Arrival]]:
    """An engine in virtual time, and its load."""
    config = EngineConfig(waiting_max=100_000, batch_max=256, step_tokens_max=512)
    clock = VirtualTime()
    executor = VirtualExecutor(
        cost_model(scenario.engine),
        config,
        swap,
        HOST_LINKS[scenario.link],
        clock,
        ladder_type=LayerFirstLadder if scenario.variant in LAYER_FIRST else CopyLadder,
    )
    engine = engine_type(executor, config, swap=swap)
    engine.configure(SchedulerConfig(preemption_policy="swap"))
    longest = min(CONTEXT_MAX, executor.max_model_len)
    return engine, clock, conversations(scenario, shrink=1.0, think_s=THINK_S, tokens_max=longest)


def _run_simulated(scenario: Scenario, swap: SwapConfig) -> Outcome:
    engine, clock, arrivals = simulated(scenario, swap)
    return _measured(scenario, engine, arrivals, clock, clock.sleep_until)


def _run_real(scenario: Scenario, swap: SwapConfig) -> Outcome:
    executor = TorchExecutor.from_random(CPU_MODEL, CPU_ENGINE, seed=0, pool_name="bench-fairness", swap=swap)
    engine = InProcessEngine(executor, CPU_ENGINE, swap=swap)
    longest = CPU_ENGINE.kv_blocks * CPU_ENGINE.block_size // 2
    arrivals = conversations(scenario, shrink=CPU_SHRINK, think_s=CPU_THINK_S, tokens_max=longest)
    engine.configure(SchedulerConfig(preemption_policy="swap"))
    try:
        return _measured(scenario, engine, arrivals, time.perf_counter, _sleep_until)
    finally:
        executor.close()


def _sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.perf_counter()))


def _measured(
    scenario: Scenario,
    engine: InProcessEngine,
    arrivals: list[Arrival],
    clock: Callable[[], float],
    sleep_until: Callable[[float], None],
) -> Outcome:
    vocabulary = min(256, engine.executor.vocab_size - 1)
    seen = ConversationLoad(arrivals, vocabulary=vocabulary, seed=scenario.seed).run(
        engine, clock, sleep_until
    )
    copier, load = engine.executor.copier, engine.load()
    assert isinstance(copier, VirtualCopier | SwapCopier) and load.swap is not None
    totals: dict[str, float] = {
        "tokens": seen.tokens,
        "seconds": seen.seconds,
        "steps": seen.steps,
        "step_s": seen.step_s,
        "preemptions": load.preemptions_total,
        "swapped_out": load.swap.swapped_out,
        "out_blocks": load.swap.out_blocks,
        "prefix_blocks": load.swap.prefix_blocks,
        "host_full": load.swap.host_full,
    }
    for direction, copied in copier.totals().items():
        for name in ("jobs", "blocks", "copies", "busy_s"):
            totals[f"copied_{direction.value}_{name}"] = getattr(copied, name)
    ttft_s, gaps_s = np.array(seen.ttft_s, np.float32), np.array(seen.gaps_s, np.float32)
    return Outcome(scenario, ttft_s, gaps_s, totals)


def _tail(seconds: list[NDArray[np.float32]]) -> dict[str, float]:
    shares = {"p50": 50, "p95": 95, "p99": 99, "p999": 99.9}
    together = np.concatenate(seconds)
    return {name: float(np.percentile(together, share)) * 1e3 for name, share in shares.items()}
