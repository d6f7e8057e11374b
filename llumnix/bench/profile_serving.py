"""What serving adds to the engine's own time, measured on a real cluster: ``llumnix profile``'s second part.

An instance's process also reads and writes messages, and frontend, manager, Ray and clients want processors
too. Two quiet workloads tell how much: lone prompts (time to the first token), and batches that only decode
(time per token). Every instance is as busy as the others, as in the first part. What the steps of the fitted
formula do not explain is split into a share of every step, a part of each request in a step, and a part of
each request's beginning. A third workload, batches that decode while requests come and go, is kept step by
step (profile_arrivals.py). No queue, and none of the requests of any other benchmark.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llumnix.bench import profile_arrivals as arrivals
from llumnix.bench.live_load import RealCluster, Streamed, real_cluster
from llumnix.bench.machine import OTHERS_MAX, OthersCpu
from llumnix.bench.profile_arrivals import ServedStep
from llumnix.bench.profile_fit import non_negative
from llumnix.core.config import Config, SwapConfig
from llumnix.sim.cost import STEP_TERMS, CostModel
from llumnix.sim.network import LATENCY_S
from llumnix.sim.workload import Arrival

LONE_PROMPTS = (16, 128, 512)
LONE_ROUNDS = 4
LONE_TOKENS = 4
BATCHES = (1, 4, 12)
BATCH_PROMPT = 4
BATCH_TOKENS = 40
BATCH_ROUNDS = 3
EDGE_TOKENS = 4
"""So many tokens at either end of an answer are left out: others of its batch begin or end then."""
TRIES = 3
MESSAGES = 4
"""Place, its answer, Submit, tokens: the simulator lets each take LATENCY_S."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Medians of a few rounds on the cluster that others on the machine left in peace, and what the engine's
    formula says, in ms. ``batch`` requests
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


@dataclass(frozen=True, slots=True)
class Served:
    """What the cluster showed. ``crowds``: single steps while requests come and go, by batch; ``lost``: how
    often an instance showed none in a round, since no client got its tokens one by one."""

    paces: tuple[Pace, ...]
    crowds: tuple[tuple[ServedStep, ...], ...]
    lost: int


def measure_serving(config: Config, cost: CostModel, seed: int, progress: Callable[[int], None]) -> Served:
    """Run the workloads on a cluster of ``config``, which is started and stopped for it."""
    scheduler = replace(config.scheduler, dispatch_policy="round-robin", pairing_policy="none")
    anew = SwapConfig(host_share=0.0)  # every round has the same prompts
    instances, paces = config.cluster.instances, []
    with real_cluster(replace(config, scheduler=scheduler, swap=anew)) as cluster:
        warm_up = Arrival(0.0, LONE_PROMPTS[0], LONE_TOKENS)
        cluster.run([warm_up] * instances, seed)  # connections are made now
        for prompt in LONE_PROMPTS:
            if prompt + LONE_TOKENS <= cost.max_model_len:
                asked = [Arrival(0.0, prompt, LONE_TOKENS)] * instances
                answers = _calm(cluster, asked, LONE_ROUNDS, seed, progress)
                first_s = statistics.median(answer.ttft_s for round in answers for answer in round)
                formula_s = _prefill_s(cost, prompt, config.engine.step_tokens_max)
                paces.append(Pace(0, prompt, first_s * 1e3, formula_s * 1e3))
        for batch in BATCHES:
            if batch <= config.engine.batch_max:
                asked = [Arrival(0.0, BATCH_PROMPT, BATCH_TOKENS)] * (batch * instances)
                answers = _calm(cluster, asked, BATCH_ROUNDS, seed, progress)
                step_s = steady_step_s([answer for round in answers for answer in round])
                formula_s = cost.step_s(batch, batch * (BATCH_PROMPT + BATCH_TOKENS // 2), 0, 0)
                paces.append(Pace(batch, 0, step_s * 1e3, formula_s * 1e3))
        crowds, lost = _crowds(cluster, config, cost, seed, progress)
    return Served(tuple(paces), tuple(crowds), lost)


def steady_step_s(answers: Sequence[Streamed]) -> float:
    """The median time per token of answers that came token by token, without their ends; else of all."""
    whole = [one.chunks_s[EDGE_TOKENS:-EDGE_TOKENS] for one in answers if len(one.chunks_s) == one.tokens]
    if not whole:
        return statistics.median(one.tpot_s for one in answers)
    return statistics.median((times[-1] - times[0]) / (len(times) - 1) for times in whole)


def _crowds(
    cluster: RealCluster, config: Config, cost: CostModel, seed: int, progress: Callable[[int], None]
) -> tuple[list[tuple[ServedStep, ...]], int]:
    """Single steps while requests come and go, by batch, and how often an instance showed none."""
    instances, crowds, lost = config.cluster.instances, [], 0
    for batch in arrivals.BATCHES:
        prompt_most = (config.engine.step_tokens_max - batch) // 2  # two fit a step
        if not arrivals.fits(batch, prompt_most, cost, config.engine.batch_max):
            continue
        step_s = cost.step_s(batch, batch * arrivals.STEADY_TOKENS // 2, 0, 0)
        asked = arrivals.crowd(batch, instances, step_s, prompt_most, seed + batch)
        steps: list[ServedStep] = []
        for answers in _calm(cluster, asked, arrivals.ROUNDS, seed, progress):
            places = [cluster.placed(answer.request_id) for answer in answers]
            for place in sorted(set(places)):
                sides: dict[bool, list[Streamed]] = {True: [], False: []}
                for answer, where in zip(answers, places, strict=True):
                    sides[where == place].append(answer)
                told = arrivals.steps_of(sides[True], sides[False])
                steps += told
                lost += not told
        crowds.append(tuple(steps))
    return crowds, lost


def rounds() -> int:
    """How often ``progress`` is told, at most."""
    crowds = arrivals.ROUNDS * len(arrivals.BATCHES)
    return LONE_ROUNDS * len(LONE_PROMPTS) + BATCH_ROUNDS * len(BATCHES) + crowds


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


def _calm(
    cluster: RealCluster, asked: Sequence[Arrival], rounds: int, seed: int, progress: Callable[[int], None]
) -> list[list[Streamed]]:
    """The answers of each of ``rounds`` rounds. One in which others used the processors is done again, a few
    times; if that does not help, those disturbed least count."""
    done: list[tuple[float, int, list[Streamed]]] = []
    while len(done) < TRIES * rounds and sum(share <= OTHERS_MAX for share, _, _ in done) < rounds:
        others = OthersCpu()
        answers = cluster.run(asked, seed + len(done))
        done.append((others.share(), len(done), answers))
    progress(rounds)
    return [answers for _, _, answers in sorted(done, key=lambda one: one[:2])[:rounds]]


def _prefill_s(cost: CostModel, prompt: int, step_tokens_max: int) -> float:
    """Seconds of a lone prompt's prefill steps."""
    total, start = 0.0, 0
    while start < prompt:
        end = min(prompt, start + step_tokens_max)
        total += cost.step_s(0, 0, end - start, end * end - start * start)
        start = end
    return total
