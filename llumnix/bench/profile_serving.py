"""What serving adds to the engine's own time, measured on a real cluster: ``llumnix profile``'s second part.

An instance's process also reads and writes messages, and frontend, manager and clients want processors too.
Two quiet workloads tell how much: lone requests (time to first token, less the steps of their prefill), and
batches that only decode (time per token, less the step that the fitted formula gives). Every instance is as
busy as the others, as in the first part. No arrival process, no queue, and none of the requests of any other
benchmark.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from llumnix.bench.live_load import RealCluster, Streamed, real_cluster
from llumnix.bench.profile_fit import non_negative
from llumnix.core.config import Config
from llumnix.sim.cost import CostModel
from llumnix.sim.network import LATENCY_S
from llumnix.sim.workload import Arrival

LONE_PROMPTS = (16, 64, 192)
LONE_ROUNDS = 3
LONE_TOKENS = 4
BATCHES = (1, 4, 12)
BATCH_PROMPT = 4
BATCH_TOKENS = 40
BATCH_ROUNDS = 3
MESSAGES = 4
"""Place, its answer, Submit, tokens: the simulator lets each take LATENCY_S."""


@dataclass(frozen=True, slots=True)
class Serving:
    """``request_ms``: added to a request's first token, messages included. ``paces``: (batch, measured ms per
    token, ms of a step by the formula), the median of a few rounds each."""

    request_ms: float
    paces: tuple[tuple[int, float, float], ...]


def measure_serving(config: Config, cost: CostModel, seed: int, progress: Callable[[int], None]) -> Serving:
    """Run both workloads on a cluster of ``config``, which is started and stopped for it."""
    scheduler = replace(config.scheduler, dispatch_policy="round-robin", pairing_policy="none")
    instances = config.cluster.instances
    with real_cluster(replace(config, scheduler=scheduler)) as cluster:
        _together(cluster, instances, LONE_PROMPTS[0], LONE_TOKENS, seed)  # connections are made now
        added = []
        for place in range(LONE_ROUNDS):
            for prompt in LONE_PROMPTS:
                answers = _together(cluster, instances, prompt, LONE_TOKENS, seed + 1 + place)
                prefill_s = _prefill_s(cost, prompt, config.engine.step_tokens_max)
                added += [(answer.ttft_s - prefill_s) * 1e3 for answer in answers]
                progress(1)
        paces = []
        for batch in BATCHES:
            if batch > config.engine.batch_max:
                break
            context = batch * (BATCH_PROMPT + BATCH_TOKENS // 2)
            rounds_s = []
            for place in range(BATCH_ROUNDS):
                answers = _together(cluster, batch * instances, BATCH_PROMPT, BATCH_TOKENS, seed + 10 + place)
                rounds_s.append(statistics.median(answer.tpot_s for answer in answers))
                progress(1)
            paces.append((batch, statistics.median(rounds_s) * 1e3, cost.step_s(batch, context, 0, 0) * 1e3))
    return Serving(statistics.median(added), tuple(paces))


def rounds() -> int:
    """How often ``progress`` is told."""
    return LONE_ROUNDS * len(LONE_PROMPTS) + BATCH_ROUNDS * len(BATCHES)


def with_serving(cost: CostModel, serving: Serving) -> CostModel:
    """The model with what serving adds: per step to ``fixed_ms``, per request in it to ``request_ms``, and to
    a request's beginning. Least squares of the relative error, nothing negative."""
    batches, measured, formula = np.array(serving.paces).T
    matrix = np.stack([np.ones_like(batches), batches], axis=1) / measured[:, None]
    per_step, per_request = non_negative(matrix, (measured - formula) / measured)
    return replace(
        cost,
        fixed_ms=float(f"{cost.fixed_ms + per_step:.5g}"),
        request_ms=float(f"{cost.request_ms + per_request:.5g}"),
        serving_ms=float(f"{max(0.0, serving.request_ms - MESSAGES * LATENCY_S * 1e3):.5g}"),
    )


def _together(cluster: RealCluster, count: int, prompt: int, tokens: int, seed: int) -> list[Streamed]:
    return cluster.run([Arrival(0.0, prompt, tokens)] * count, seed)


def _prefill_s(cost: CostModel, prompt: int, step_tokens_max: int) -> float:
    """Seconds of a lone prompt's prefill steps."""
    total, start = 0.0, 0
    while start < prompt:
        end = min(prompt, start + step_tokens_max)
        total += cost.step_s(0, 0, end - start, end * end - start * start)
        start = end
    return total
