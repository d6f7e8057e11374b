"""Steps among arrivals: put together from what clients saw, and what is made of them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from llumnix.bench.live_load import Streamed
from llumnix.bench.profile_arrivals import (
    NEW_TOKENS,
    PROMPTS,
    RATIO_MIN,
    SETTLE_STEPS,
    STEADY_PROMPT,
    STEADY_TOKENS,
    ServedStep,
    arrival_ms,
    crowd,
    ratios,
    spread_of,
    steps_of,
)
from llumnix.bench.profile_serving import Pace, paces_of, with_arrivals
from llumnix.core.errors import LlumnixError
from llumnix.sim.cost import LLAMA_7B_A10, StepFeatures
from llumnix.sim.spread import SPREAD_SHARES, at_share, spread_mean
from llumnix.sim.workload import Arrival


def streamed(prompt: int, sent_s: float, chunks_s: Sequence[float], tokens: int) -> Streamed:
    arrival = Arrival(sent_s, prompt, tokens)
    return Streamed(arrival, sent_s, chunks_s[0], chunks_s[-1], 0.0, tokens, "", "", tuple(chunks_s))


ENDS = np.cumsum(np.linspace(0.02, 0.04, STEADY_TOKENS + 2))
LONG = streamed(STEADY_PROMPT, 0.0, ENDS[:STEADY_TOKENS], STEADY_TOKENS)
"""Seen from the first answer, the other ends with it: its two steps more are not to be seen."""
LATER = streamed(STEADY_PROMPT, 0.0, ENDS[2:] + 0.001, STEADY_TOKENS)


def test_steps_are_those_that_an_instance_must_have_done() -> None:
    new = streamed(40, ENDS[28] + 0.002, ENDS[30:32] + 0.003, NEW_TOKENS)
    calls_s = [new.sent_s, ENDS[59] + 0.001, ENDS[59] + 0.002, ENDS[80] + 0.01]
    steps = steps_of([LONG, LATER, new], calls_s)
    begin = SETTLE_STEPS
    assert len(steps) == STEADY_TOKENS - begin
    by_place = dict(enumerate(steps, start=begin))
    assert [step.seconds for step in steps] == pytest.approx(np.diff(ENDS[begin - 1 : STEADY_TOKENS]))
    assert by_place[30].features == StepFeatures(2, 2 * STEADY_PROMPT + 2 * 30, 40, 1600)
    assert by_place[31].features == StepFeatures(3, 2 * STEADY_PROMPT + 2 * 31 + 40 + 1, 0, 0)
    assert by_place[32].features == StepFeatures(2, 2 * STEADY_PROMPT + 2 * 32, 0, 0)
    assert {place: step.arrivals for place, step in by_place.items() if step.arrivals} == {
        29: 1,
        60: 2,
        81: 1,
    }
    assert [place for place, step in by_place.items() if step.prefills] == [30]


def test_half_a_character_as_first_token_changes_nothing_and_tokens_that_came_together_tell_nothing() -> None:
    shown, half = (streamed(40, ENDS[28], chunks, NEW_TOKENS) for chunks in (ENDS[30:32], ENDS[31:32]))
    assert steps_of([LONG, half], []) == steps_of([LONG, shown], [])
    together = streamed(STEADY_PROMPT, 0.0, np.delete(ENDS[:STEADY_TOKENS], 7), STEADY_TOKENS)
    assert steps_of([together], []) == []
    assert len(steps_of([together, LONG], [])) > STEADY_TOKENS // 2


def test_a_crowd_is_the_same_for_its_seed_and_fits_its_steps() -> None:
    asked = crowd(3, 2, 0.03, 100, seed=1)
    assert asked == crowd(3, 2, 0.03, 100, seed=1) != crowd(3, 2, 0.03, 100, seed=2)
    assert [one.output_tokens for one in asked[:7]] == [STEADY_TOKENS] * 6 + [NEW_TOKENS]
    assert all(PROMPTS[0] <= one.prompt_tokens <= 100 for one in asked[6:])
    assert asked[6].at_s > 0 and asked[-1].at_s < STEADY_TOKENS * 0.03


COST = replace(LLAMA_7B_A10, arrival_ms=6.0)


def served(
    factors: Sequence[float], *, prompt: int = 0, arrivals: int = 0, cost_ms: float = 0.0
) -> list[ServedStep]:
    features = StepFeatures(4, 900, prompt, prompt * prompt)
    model_s = COST.step_s(*features)
    return [
        ServedStep(features, model_s * factor + cost_ms * 1e-3 * arrivals, arrivals) for factor in factors
    ]


def test_what_an_arrival_costs_is_what_steps_take_more_per_request_that_arrives() -> None:
    calm = served([0.99, 1.01, 1.02])
    assert arrival_ms(COST, [*calm, *served([1.0, 1.02], arrivals=1, cost_ms=6.0)]) == pytest.approx(
        6.0, abs=0.3
    )
    assert arrival_ms(COST, [*calm, *served([1.0, 1.02], arrivals=3, cost_ms=6.0)]) == pytest.approx(
        6.0, abs=0.3
    )
    assert arrival_ms(COST, [*calm, *served([0.9, 0.8], arrivals=1)]) == 0.0
    assert arrival_ms(COST, calm) == 0.0
    assert ratios(COST, served([1.1, 0.9], arrivals=2, cost_ms=6.0)) == pytest.approx([1.1, 0.9], abs=0.03)


def test_spreads_are_those_of_the_steps_with_a_mean_of_one() -> None:
    drawn = np.random.default_rng(0).gamma(8.0, 1.2 / 8.0, 4000)
    spread = spread_of(drawn)
    assert spread_mean(spread) == pytest.approx(1.0, abs=1e-4)
    median = at_share(spread, SPREAD_SHARES[3])
    assert median == pytest.approx(float(np.median(drawn)) / drawn.mean(), rel=0.02)
    late_then_early = spread_of([1.0] * 60 + [2.0, 0.0])
    assert late_then_early[0] == pytest.approx(RATIO_MIN, rel=0.2)
    with pytest.raises(LlumnixError, match="only 39 single steps"):
        spread_of([1.0] * 39)


def test_a_model_takes_arrivals_and_both_spreads_from_its_steps() -> None:
    rng = np.random.default_rng(1)
    steps = [
        *served(rng.normal(1.0, 0.02, 400)),
        *served(rng.normal(1.0, 0.02, 90), arrivals=1, cost_ms=5.0),
        *served(rng.normal(1.0, 0.1, 100), prompt=200),
    ]
    model = with_arrivals(replace(COST, arrival_ms=0.0), steps)
    assert model.arrival_ms == pytest.approx(5.0, abs=0.5)
    decode, prefill = (np.ptp(spread[1:-1]) for spread in (model.decode_spread, model.prefill_spread))
    assert prefill > 3 * decode > 0


def test_paces_are_means_of_the_steps_in_which_nobody_arrived() -> None:
    steps = [
        *served([1.0, 1.2]),
        *served([1.3], prompt=100),
        *served([9.0], arrivals=1),
        *served([9.0], prompt=100, arrivals=1),
    ]
    alone_ms, mixed_ms = (COST.step_s(4, 900, prompt, prompt**2) * 1e3 for prompt in (0, 100))
    decoding, mixed = paces_of(COST, steps)
    assert decoding == Pace(4.0, 0.0, pytest.approx(1.1 * alone_ms), pytest.approx(alone_ms))
    assert mixed == Pace(4.0, 100.0, pytest.approx(1.3 * mixed_ms), pytest.approx(mixed_ms))
