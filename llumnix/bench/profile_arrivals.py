"""Single steps of engines in service while requests arrive: the last thing that ``llumnix profile`` measures.

A batch decodes long answers on every instance, and prompts that want two tokens arrive at random moments.
What a client of a long answer sees between two tokens is a step of its instance, and what that step had to do
is known: who was in it and which prompt it prefilled. So its time can be held against the formula's, step by
step: those in which a request arrived say what an arrival costs all others on the host, and all of them how
steps scatter around the formula. Means over answers and times to a first token are not looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llumnix.bench.live_load import Streamed
from llumnix.core.errors import LlumnixError
from llumnix.sim.cost import CostModel, StepFeatures
from llumnix.sim.spread import SPREAD_SHARES, Spread, spread_mean
from llumnix.sim.workload import Arrival

BATCHES = (2, 6, 14)
ROUNDS = 4
STEADY_PROMPT, STEADY_TOKENS = 4, 96
NEW_TOKENS = 2
STEPS_PER_ARRIVAL = 4
"""On the host, before what prompts add; so each instance prefills in a small part of its steps."""
PROMPTS = (16, 256)
STEPS_MIN = 40
RATIO_MIN = 0.2
"""A token that came sooner than that after another came on time, and the other late."""
SETTLE_STEPS = 4
"""Counted after the last long answer began: how many steps the batch's prompts took is not known exactly."""


@dataclass(frozen=True, slots=True)
class ServedStep:
    """What a step had to do, what it took from a client's side, and how many requests arrived at the host
    meanwhile."""

    features: StepFeatures
    seconds: float
    arrivals: int

    @property
    def prefills(self) -> bool:
        """Whether it computed tokens of a prompt."""
        return self.features.prefill > 0


def crowd(batch: int, instances: int, step_s: float, prompt_most: int, seed: int) -> list[Arrival]:
    """``batch`` long answers for each instance at once, then short ones until these are nearly over, if a
    step takes ``step_s``."""
    rng = np.random.default_rng(seed)
    gap_s, count = STEPS_PER_ARRIVAL * step_s, STEADY_TOKENS // STEPS_PER_ARRIVAL - 2
    times = gap_s * (1 + np.arange(count) + rng.random(count))
    low, high = np.log(PROMPTS[0]), np.log(max(PROMPTS[0], min(PROMPTS[1], prompt_most)))
    prompts = np.exp(rng.uniform(low, high, count)).astype(int)
    return [
        *[Arrival(0.0, STEADY_PROMPT, STEADY_TOKENS)] * (batch * instances),
        *(Arrival(float(at), int(prompt), NEW_TOKENS) for at, prompt in zip(times, prompts, strict=True)),
    ]


def steps_of(answers: Sequence[Streamed], calls_s: Sequence[float]) -> list[ServedStep]:
    """The steps of one instance while its whole batch decodes. ``answers``: all that it gave, ``calls_s``:
    when requests arrived at any instance of the host. Nothing if no long answer came token by token."""
    whole = [one for one in answers if len(one.chunks_s) == one.tokens == STEADY_TOKENS]
    if not whole:
        return []
    ends, calls = np.array(whole[0].chunks_s), np.sort(calls_s)
    spans = []
    for one in answers:  # the last chunk always comes; half a character as the first token shows nothing
        last = int(np.abs(ends - one.last_s).argmin())
        spans.append((one, last - one.tokens + 1, last))
    steady = [(first, last) for one, first, last in spans if one.tokens == STEADY_TOKENS]
    begin, until = max(first for first, _ in steady) + SETTLE_STEPS, min(last for _, last in steady)
    steps = []
    for place in range(begin, until + 1):
        decoding = [
            one.arrival.prompt_tokens + place - first for one, first, last in spans if first < place <= last
        ]
        begun = [one.arrival.prompt_tokens for one, first, _ in spans if first == place]
        attended = sum(prompt * prompt for prompt in begun)
        features = StepFeatures(len(decoding), sum(decoding), sum(begun), attended)
        before, after = ends[place - 1], ends[place]
        arrivals = int(np.searchsorted(calls, after) - np.searchsorted(calls, before))
        steps.append(ServedStep(features, float(after - before), arrivals))
    return steps


def arrival_ms(cost: CostModel, steps: Sequence[ServedStep]) -> float:
    """By how much more steps exceed the formula if a request arrives in them, per request; at least 0."""
    over: dict[bool, list[float]] = {True: [], False: []}
    for step in steps:
        over[step.arrivals > 0].append((step.seconds - cost.step_s(*step.features)) * 1e3)
    arrived = sum(step.arrivals for step in steps)
    if not arrived or not over[False]:
        return 0.0
    more = float(np.mean(over[True]) - np.mean(over[False]))
    return max(0.0, more * len(over[True]) / arrived)


def ratios(cost: CostModel, steps: Sequence[ServedStep]) -> list[float]:
    """Measured over predicted, arrivals included."""
    return [
        step.seconds / (cost.step_s(*step.features) + cost.arrival_ms * 1e-3 * step.arrivals)
        for step in steps
    ]


def spread_of(values: Sequence[float]) -> Spread:
    """The quantiles of ratios, RATIO_MIN at least, divided by their mean."""
    if len(values) < STEPS_MIN:
        raise LlumnixError(
            f"only {len(values)} single steps could be told apart: something else wants the processors"
        )
    points = [max(RATIO_MIN, float(point)) for point in np.quantile(values, SPREAD_SHARES)]
    mean = spread_mean(points)
    return tuple(float(f"{point / mean:.5g}") for point in points)
