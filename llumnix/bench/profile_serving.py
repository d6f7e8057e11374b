"""What serving adds to the engine's own time, measured on a real cluster: ``llumnix profile``'s second part.

An instance's process also reads and writes messages, and frontend, manager, Ray and clients want processors
too. Two quiet workloads tell how much: lone prompts (time to the first token), and batches that only decode
(time per token). Every instance is as busy as the others, as in the first part. What the steps of the fitted
formula do not explain is split into a share of every step, a part of each request in a step, and a part of
each request's beginning. No arrival process, no queue, and none of the requests of any other benchmark.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llumnix.bench.live_load import RealCluster, Streamed, real_cluster
from llumnix.bench.profile_fit import non_negative
from llumnix.core.config import Config
from llumnix.sim.cost import STEP_TERMS, CostModel
from llumnix.sim.network import LATENCY_S
from llumnix.sim.workload import Arrival

LONE_PROMPTS = (16, 128, 512)
LONE_ROUNDS = 5
LONE_TOKENS = 4
BATCHES = (1, 4, 12)
BATCH_PROMPT = 4
BATCH_TOKENS = 40
BATCH_ROUNDS = 4
MESSAGES = 4
"""Place, its answer, Submit, tokens: the simulator lets each take LATENCY_S."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Medians of the quickest of a few rounds on the cluster (others on the machine only ever add), and what
    the engine's formula says, in ms. ``batch`` requests
    decoding on each instance, time per token; 0: a lone prompt of ``prompt`` tokens, time to the first."""

    batch: int
    prompt: int
    measured_ms: float
    formula_ms: float


@dataclass(frozen=True, slots=True)
class Added:
    """What serving adds: ``share`` of every step, ``per_request_ms`` to a step for each request it decodes,
    ``first_token_ms`` to each request's first token, messages included."""

    share: float
    per_request_ms: float
    first_token_ms: float


def measure_serving(
    config: Config, cost: CostModel, seed: int, progress: Callable[[int], None]
) -> list[Pace]:
    """Run both workloads on a cluster of ``config``, which is started and stopped for it."""
    scheduler = replace(config.scheduler, dispatch_policy="round-robin", pairing_policy="none")
    instances, paces = config.cluster.instances, []
    with real_cluster(replace(config, scheduler=scheduler)) as cluster:
        _together(cluster, instances, LONE_PROMPTS[0], LONE_TOKENS, seed)  # connections are made now
        for prompt in LONE_PROMPTS:
            if prompt + LONE_TOKENS <= cost.max_model_len:
                rounds_s = []
                for number in range(LONE_ROUNDS):
                    answers = _together(cluster, instances, prompt, LONE_TOKENS, seed + number)
                    rounds_s.append(statistics.median(answer.ttft_s for answer in answers))
                    progress(1)
                formula_s = _prefill_s(cost, prompt, config.engine.step_tokens_max)
                paces.append(Pace(0, prompt, min(rounds_s) * 1e3, formula_s * 1e3))
        for batch in BATCHES:
            if batch <= config.engine.batch_max:
                context = batch * (BATCH_PROMPT + BATCH_TOKENS // 2)
                rounds_s = []
                for number in range(BATCH_ROUNDS):
                    answers = _together(cluster, batch * instances, BATCH_PROMPT, BATCH_TOKENS, seed + number)
                    rounds_s.append(statistics.median(answer.tpot_s for answer in answers))
                    progress(1)
                formula_s = cost.step_s(batch, context, 0, 0)
                paces.append(Pace(batch, 0, min(rounds_s) * 1e3, formula_s * 1e3))
    return paces


def rounds() -> int:
    """How often ``progress`` is told, at most."""
    return LONE_ROUNDS * len(LONE_PROMPTS) + BATCH_ROUNDS * len(BATCHES)


def added(paces: Sequence[Pace]) -> Added:
    """Least squares of the relative error, nothing negative."""
    measured = np.array([pace.measured_ms for pace in paces])
    formula = np.array([pace.formula_ms for pace in paces])
    batches = np.array([float(pace.batch) for pace in paces])
    matrix = np.stack([formula, batches, batches == 0], axis=1) / measured[:, None]
    return Added(*(float(f"{value:.4g}") for value in non_negative(matrix, (measured - formula) / measured)))


def with_serving(cost: CostModel, extra: Added) -> CostModel:
    """The model with what serving adds; the messages that the simulator times itself are taken off."""
    terms = {name: getattr(cost, name) * (1 + extra.share) for name in STEP_TERMS}
    terms["request_ms"] += extra.per_request_ms
    terms["serving_ms"] = max(0.0, extra.first_token_ms - MESSAGES * LATENCY_S * 1e3)
    rounded: dict[str, Any] = {name: float(f"{value:.5g}") for name, value in terms.items()}
    return replace(cost, **rounded)


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
