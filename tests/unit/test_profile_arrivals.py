"""Single steps while requests come and go: put together from what clients saw, and what is made of them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from llumnix.bench.live_load import Streamed
from llumnix.bench.profile_arrivals import (
    ALONE_STEPS,
    PROMPTS,
    RATIO_MIN,
    SETTLE_STEPS,
    SHORT_TOKENS,
    STEADY_PROMPT,
    STEADY_TOKENS,
    Moments,
    ServedStep,
    crowd,
    expected_s,
    fits,
    hold_ups_ms,
    ratios,
    spread_of,
    steps_of,
    with_arrivals,
)
from llumnix.core.errors import LlumnixError
from llumnix.sim.cost import HOLD_UPS, LLAMA_7B_A10, StepFeatures
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
    ours = streamed(40, ENDS[28] + 0.002, ENDS[30:32] + 0.003, SHORT_TOKENS)
    theirs = streamed(90, ENDS[59] + 0.001, (ENDS[61] + 0.01, ENDS[63] + 0.01), SHORT_TOKENS)
    again = streamed(90, ENDS[59] + 0.002, (ENDS[61] + 0.01, ENDS[70] + 0.01), SHORT_TOKENS)
    steps = steps_of([LONG, LATER, ours], [theirs, again, LONG])
    assert len(steps) == STEADY_TOKENS - SETTLE_STEPS
    by_place = dict(enumerate(steps, start=SETTLE_STEPS))
    assert [step.seconds for step in steps] == pytest.approx(np.diff(ENDS[SETTLE_STEPS - 1 : STEADY_TOKENS]))
    assert by_place[30].features == StepFeatures(2, 2 * STEADY_PROMPT + 2 * 30, 40, 1600)
    assert by_place[31].features == StepFeatures(3, 2 * STEADY_PROMPT + 2 * 31 + 40 + 1, 0, 0)
    assert by_place[32].features == StepFeatures(2, 2 * STEADY_PROMPT + 2 * 32, 0, 0)
    assert [place for place, step in by_place.items() if step.prefills] == [30]
    assert [place for place, step in by_place.items() if step.alone] == list(range(SETTLE_STEPS, 29))
    assert {place: step.moments for place, step in by_place.items() if any(step.moments)} == {
        29: Moments(1, 0, 0),
        31: Moments(0, 1, 0),
        32: Moments(0, 0, 1),
        60: Moments(2, 0, 0),
        62: Moments(0, 2, 0),
        64: Moments(0, 0, 1),
        71: Moments(0, 0, 1),
    }


def test_half_a_character_as_first_token_changes_nothing_and_tokens_that_came_together_tell_nothing() -> None:
    shown, half = (streamed(40, ENDS[28], chunks, SHORT_TOKENS) for chunks in (ENDS[30:32], ENDS[31:32]))
    assert steps_of([LONG, half], []) == steps_of([LONG, shown], [])
    together = streamed(STEADY_PROMPT, 0.0, np.delete(ENDS[:STEADY_TOKENS], 7), STEADY_TOKENS)
    assert steps_of([together], []) == []
    assert len(steps_of([together, LONG], [])) > STEADY_TOKENS // 2


def test_a_crowd_is_the_same_for_its_seed_and_comes_while_the_batch_decodes() -> None:
    asked = crowd(3, 2, 0.03, 100, seed=1)
    assert asked == crowd(3, 2, 0.03, 100, seed=1) != crowd(3, 2, 0.03, 100, seed=2)
    assert [one.output_tokens for one in asked[:7]] == [STEADY_TOKENS] * 6 + [SHORT_TOKENS]
    assert all(PROMPTS[0] <= one.prompt_tokens <= 100 for one in asked[6:])
    assert asked[6].at_s >= ALONE_STEPS * 0.03 and asked[-1].at_s < STEADY_TOKENS * 0.03


def test_a_crowd_that_would_have_to_wait_is_left_out() -> None:
    roomy = replace(LLAMA_7B_A10, capacity_tokens=8000, max_model_len=2048)
    assert fits(14, 249, roomy, batch_max=64)
    assert not fits(14, 249, roomy, batch_max=15)
    assert not fits(14, 249, replace(roomy, capacity_tokens=4000), batch_max=64)
    assert not fits(14, 249, replace(roomy, max_model_len=200), batch_max=64)
    assert not fits(14, 9, roomy, batch_max=64)


HELD = replace(LLAMA_7B_A10, arrival_ms=6.0, answer_ms=2.0, end_ms=1.0)
NONE = Moments(0, 0, 0)


def served(
    factors: Sequence[float], moments: Moments = NONE, *, prompt: int = 0, alone: bool = False
) -> list[ServedStep]:
    """Steps that take what HELD says of them times a factor."""
    bare = ServedStep(StepFeatures(4, 900, prompt, prompt * prompt), 0.0, moments, alone)
    return [replace(bare, seconds=expected_s(HELD, bare) * factor) for factor in factors]


def test_what_holds_steps_up_is_told_apart_whatever_the_formula_is_off_for_a_batch() -> None:
    noise = np.random.default_rng(0)
    crowds = []
    for usual in (0.9, 1.1):
        steps = served(usual * noise.normal(1.0, 0.01, 60), alone=True)
        for moments in (NONE, Moments(1, 0, 0), Moments(0, 1, 1), Moments(0, 0, 2), Moments(2, 1, 0)):
            steps += served(usual * noise.normal(1.0, 0.01, 60), moments)
        crowds.append([*steps, *served([9.0] * 9, Moments(1, 1, 1), prompt=100)])
    found = hold_ups_ms(LLAMA_7B_A10, crowds)
    assert [found[name] for name in HOLD_UPS] == pytest.approx([6.0, 2.0, 1.0], abs=0.25)
    quicker = [*served([1.0], alone=True), *served([0.5, 0.6], Moments(1, 1, 1))]
    assert set(hold_ups_ms(LLAMA_7B_A10, [quicker]).values()) == {0.0}
    assert set(hold_ups_ms(LLAMA_7B_A10, [served([1.0, 1.1])]).values()) == {0.0}  # nothing to compare with


def test_ratios_count_hold_ups_as_foreseen() -> None:
    assert ratios(HELD, served([1.1, 0.9], Moments(2, 0, 1))) == pytest.approx([1.1, 0.9])


def test_spreads_are_those_of_the_steps_with_a_mean_of_one() -> None:
    drawn = np.random.default_rng(0).gamma(8.0, 1.2 / 8.0, 4000)
    spread = spread_of([float(one) for one in drawn])
    assert spread_mean(spread) == pytest.approx(1.0, abs=1e-4)
    median = at_share(spread, SPREAD_SHARES[3])
    assert median == pytest.approx(float(np.median(drawn)) / drawn.mean(), rel=0.02)
    late_then_early = spread_of([1.0] * 60 + [2.0, 0.0])
    assert late_then_early[0] == pytest.approx(RATIO_MIN, rel=0.2)
    assert spread_of([1.0] * 39) == ()


def test_a_model_takes_hold_ups_mixed_steps_and_both_spreads_from_its_steps() -> None:
    rng = np.random.default_rng(1)
    steps = [
        *served(rng.normal(1.0, 0.02, 100), alone=True),
        *served(rng.normal(1.0, 0.02, 300)),
        *served(rng.normal(1.0, 0.02, 90), Moments(1, 0, 0)),
        *served(rng.normal(1.1, 0.1, 100), prompt=200),
    ]
    model = with_arrivals(LLAMA_7B_A10, [steps])
    assert model.arrival_ms == pytest.approx(6.0, abs=0.5)
    assert model.mixed_ms == pytest.approx(0.1 * HELD.step_s(4, 900, 200, 200**2) * 1e3, rel=0.2)
    decode, prefill = (np.ptp(spread[1:-1]) for spread in (model.decode_spread, model.prefill_spread))
    assert prefill > 3 * decode > 0
    assert with_arrivals(LLAMA_7B_A10, []) == LLAMA_7B_A10
    with pytest.raises(LlumnixError, match="only 3 single steps"):
        with_arrivals(LLAMA_7B_A10, [steps[:3]])
