"""Single steps of engines in service while requests come and go: the last thing that ``llumnix profile``
measures.

A batch decodes long answers on every instance, alone at first; then prompts that want two tokens arrive at
random moments. What a client of a long answer sees between two tokens is a step of its instance, and what
that step had to do is known: who was in it and which prompt it prefilled. So its time can be held against
the formula's, step by step. Steps during which a request arrived, had its first token or ended somewhere on
the host say what each of these costs others, compared with the same batch while it was alone; and all of them
say how steps scatter around the formula. Means over answers and times to a first token are not looked at.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from llumnix.bench.live_load import Streamed
from llumnix.bench.profile_fit import non_negative
from llumnix.core.errors import LlumnixError
from llumnix.sim.cost import HOLD_UPS, CostModel, StepFeatures
from llumnix.sim.spread import SPREAD_SHARES, Spread, spread_mean
from llumnix.sim.workload import Arrival

BATCHES = (2, 6, 14)
ROUNDS = 4
STEADY_PROMPT, STEADY_TOKENS = 4, 112
ALONE_STEPS = 24
SHORT_TOKENS = 2
STEPS_PER_ARRIVAL = 4
"""On the host, before what prompts add; so each instance prefills in a small part of its steps."""
PROMPTS = (16, 256)
SETTLE_STEPS = 4
"""Counted after the last long answer began: how many steps the batch's prompts took is not known exactly."""
STEPS_MIN = 40
RATIO_MIN = 0.2
"""A token that came sooner than that after another came on time, and the other late."""


class Moments(NamedTuple):
    """How many requests arrived, had their first token, ended at the host, as HOLD_UPS has it."""

    arrivals: int
    answers: int
    ends: int


@dataclass(frozen=True, slots=True)
class ServedStep:
    """What a step had to do, what it took from a client's side, and what happened at the host meanwhile.
    ``alone``: before the first short request."""

    features: StepFeatures
    seconds: float
    moments: Moments
    alone: bool

    @property
    def prefills(self) -> bool:
        """Whether it computed tokens of a prompt."""
        return self.features.prefill > 0


def crowd(batch: int, instances: int, step_s: float, prompt_most: int, seed: int) -> list[Arrival]:
    """``batch`` long answers for each instance at once, alone for a while, then short ones until these are
    nearly over, if a step takes ``step_s``."""
    rng = np.random.default_rng(seed)
    count = (STEADY_TOKENS - ALONE_STEPS) // STEPS_PER_ARRIVAL - 2
    times = step_s * (ALONE_STEPS + STEPS_PER_ARRIVAL * (np.arange(count) + rng.random(count)))
    low, high = np.log(PROMPTS[0]), np.log(min(PROMPTS[1], prompt_most))
    prompts = np.exp(rng.uniform(low, high, count)).astype(int)
    return [
        *[Arrival(0.0, STEADY_PROMPT, STEADY_TOKENS)] * (batch * instances),
        *(Arrival(float(at), int(prompt), SHORT_TOKENS) for at, prompt in zip(times, prompts, strict=True)),
    ]


def fits(batch: int, prompt_most: int, cost: CostModel, batch_max: int) -> bool:
    """Whether an instance can serve such a crowd with nobody waiting."""
    tokens = batch * (STEADY_PROMPT + STEADY_TOKENS) + 2 * (PROMPTS[1] + SHORT_TOKENS)
    longest = max(STEADY_PROMPT + STEADY_TOKENS, PROMPTS[1] + SHORT_TOKENS)
    roomy = 2 * tokens <= cost.capacity_tokens and longest <= cost.max_model_len
    return roomy and batch + 2 <= batch_max and prompt_most >= PROMPTS[0]


def steps_of(ours: Sequence[Streamed], elsewhere: Sequence[Streamed]) -> list[ServedStep]:
    """The steps of one instance while its whole batch decodes. ``ours``: all answers that it gave,
    ``elsewhere``: those of other instances of the host. Nothing if no long answer came token by token."""
    whole = [one for one in ours if len(one.chunks_s) == one.tokens == STEADY_TOKENS]
    if not whole:
        return []
    ends = np.array(whole[0].chunks_s)
    spans = []
    for one in ours:  # the last chunk always comes; half a character as the first token shows nothing
        last = int(np.abs(ends - one.last_s).argmin())
        spans.append((one, last - one.tokens + 1, last))
    steady = [(first, last) for one, first, last in spans if one.tokens == STEADY_TOKENS]
    begin, until = max(first for first, _ in steady) + SETTLE_STEPS, min(last for _, last in steady)
    short = [span for span in spans if span[0].tokens == SHORT_TOKENS]
    others = [one for one in elsewhere if one.tokens == SHORT_TOKENS]
    calls = [one.sent_s for one in others] + [one.sent_s for one, _, _ in short]
    # What follows a token is done in the step after it.
    happened = [
        np.searchsorted(ends, calls),
        [*np.searchsorted(ends, [one.first_s for one in others]), *(first + 1 for _, first, _ in short)],
        [*np.searchsorted(ends, [one.last_s for one in others]), *(last + 1 for _, _, last in short)],
    ]
    counts = [np.bincount(np.array(places, dtype=int), minlength=until + 1) for places in happened]
    steps = []
    for place in range(begin, until + 1):
        decoding = [
            one.arrival.prompt_tokens + place - first for one, first, last in spans if first < place <= last
        ]
        begun = [one.arrival.prompt_tokens for one, first, _ in spans if first == place]
        attended = sum(prompt * prompt for prompt in begun)
        moments = Moments(*(int(count[place]) for count in counts))
        alone = bool(ends[place] < min(calls, default=np.inf))
        features = StepFeatures(len(decoding), sum(decoding), sum(begun), attended)
        steps.append(ServedStep(features, float(ends[place] - ends[place - 1]), moments, alone))
    return steps


def with_arrivals(cost: CostModel, crowds: Sequence[Sequence[ServedStep]]) -> CostModel:
    """The model with what single steps say: what requests of others cost, what steps that both decode and
    prefill take in service, and how all scatter around that. ``crowds``: steps by batch; none where no batch
    fits the engine, and then the model stays as it is."""
    if not crowds:
        return cost
    steps = [step for crowd in crowds for step in crowd]
    if len(steps) < STEPS_MIN:
        raise LlumnixError(
            f"only {len(steps)} single steps could be told apart: other processes want the processors"
        )
    held: dict[str, Any] = {name: float(f"{ms:.5g}") for name, ms in hold_ups_ms(cost, crowds).items()}
    cost = replace(cost, **held)
    mixed_s = [step.seconds - expected_s(cost, step) for step in steps if step.prefills]
    more_ms = statistics.fmean(mixed_s) * 1e3 if mixed_s else 0.0
    cost = replace(cost, mixed_ms=float(f"{max(0.0, cost.mixed_ms + more_ms):.5g}"))
    spreads: dict[str, Any] = {
        name: spread_of(ratios(cost, [step for step in steps if step.prefills == prefills]))
        for name, prefills in (("decode_spread", False), ("prefill_spread", True))
    }
    return replace(cost, **spreads)


def hold_ups_ms(cost: CostModel, crowds: Sequence[Sequence[ServedStep]]) -> dict[str, float]:
    """Least squares over steps that only decode, nothing negative. A step counts by what it took above its
    formula times what the same batch took of that while it was alone, so that the formula's errors for a
    batch are not taken for others' doing."""
    rows: list[Moments] = []
    over_ms: list[float] = []
    for crowd in crowds:
        decodes = [step for step in crowd if not step.prefills]
        alone = [step.seconds / cost.step_s(*step.features) for step in decodes if step.alone]
        if alone:
            usual = statistics.fmean(alone)
            busy = [step for step in decodes if not step.alone]
            rows += [step.moments for step in busy]
            over_ms += [(step.seconds - usual * cost.step_s(*step.features)) * 1e3 for step in busy]
    matrix = np.array(rows, dtype=np.float64).reshape(-1, len(HOLD_UPS))
    found = non_negative(matrix, np.array(over_ms))
    return {name: float(value) for name, value in zip(HOLD_UPS, found, strict=True)}


def expected_s(cost: CostModel, step: ServedStep) -> float:
    """What the model says of a step, hold-ups included."""
    held_ms = 0.0
    for name, count in zip(HOLD_UPS, step.moments, strict=True):
        held_ms += getattr(cost, name) * count
    return cost.step_s(*step.features) + held_ms * 1e-3


def ratios(cost: CostModel, steps: Sequence[ServedStep]) -> list[float]:
    """Measured over predicted."""
    return [step.seconds / expected_s(cost, step) for step in steps]


def spread_of(values: Sequence[float]) -> Spread:
    """The quantiles of ratios, RATIO_MIN at least, divided by their mean. Too few are no spread."""
    if len(values) < STEPS_MIN:
        return ()
    points = [max(RATIO_MIN, float(point)) for point in np.quantile(values, SPREAD_SHARES)]
    mean = spread_mean(points)
    return tuple(float(f"{point / mean:.5g}") for point in points)
