"""Profiles: the fit gives coefficients back, a probe's steps are what they are meant to be."""

from dataclasses import replace

import numpy as np
import pytest

from llumnix.bench.live_load import Streamed
from llumnix.bench.profile_fit import fit_copy_ms, fit_steps, non_negative, relative_errors
from llumnix.bench.profile_grid import TRIES_MAX, Probe, Scenario, grid, held_out
from llumnix.bench.profile_serving import MESSAGES, Added, Pace, added, steady_step_s, with_serving
from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.torch_executor import TorchExecutor
from llumnix.sim.cost import LLAMA_7B_A10, STEP_TERMS, StepFeatures
from llumnix.sim.network import LATENCY_S
from llumnix.sim.workload import Arrival


def features_of(scenario: Scenario) -> StepFeatures:
    start, end = scenario.start, scenario.start + scenario.chunk
    attended = end * end - start * start if scenario.chunk else 0
    return StepFeatures(len(scenario.contexts), sum(scenario.contexts), scenario.chunk, attended)


FEATURES = [features_of(scenario) for scenario in grid()]


@pytest.mark.parametrize("weights_ms", [0.0, 0.21 * 64, 0.21 * 256])
def test_a_fit_gives_back_the_formula_it_is_fed(weights_ms: float) -> None:
    model = replace(LLAMA_7B_A10, fixed_ms=3.0, weights_ms=weights_ms, mixed_ms=4.0)
    fitted = fit_steps(FEATURES, [model.step_s(*features) for features in FEATURES])
    for name in STEP_TERMS:
        assert fitted[name] == pytest.approx(getattr(model, name), rel=1e-6, abs=1e-9), name
    checked = [features_of(scenario) for scenario in held_out(3)]
    errors = relative_errors(fitted, checked, [model.step_s(*features) for features in checked])
    assert np.abs(errors).max() < 1e-6


def test_no_coefficient_is_negative_and_the_best_of_those_is_found() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        matrix, wanted = rng.normal(size=(12, 4)), rng.normal(size=12)
        found = non_negative(matrix, wanted)
        assert (found >= 0).all()
        gradient = matrix.T @ (matrix @ found - wanted)  # the conditions of a minimum under x >= 0
        assert (gradient > -1e-9).all() and np.abs(gradient[found > 0]).max(initial=0) < 1e-9


def test_an_engine_too_small_for_the_grid_is_refused_with_what_to_change() -> None:
    with pytest.raises(ConfigurationError, match=r"needs 14 kinds of steps, only 3 fit.*kv_gib"):
        fit_steps(FEATURES[:3], [1.0, 1.0, 1.0])


def test_copies_are_fitted_per_token() -> None:
    assert fit_copy_ms([(128, 0.0256), (2048, 0.4096)]) == pytest.approx(0.2)


def test_what_serving_adds_goes_to_steps_requests_and_beginnings() -> None:
    decoding = [Pace(batch, 0, 40.0 * 1.05 + 0.5 * batch, 40.0) for batch in (1, 4, 12)]
    lone = [Pace(0, prompt, prompt * 1.05 + 9.0, float(prompt)) for prompt in (16, 128, 512)]
    extra = added([*lone, *decoding])
    assert (extra.share, extra.per_request_ms) == (pytest.approx(0.05), pytest.approx(0.5))
    model = with_serving(LLAMA_7B_A10, extra)
    assert model.weights_ms == pytest.approx(LLAMA_7B_A10.weights_ms * 1.05, rel=1e-4)
    assert model.request_ms == pytest.approx(LLAMA_7B_A10.request_ms * 1.05 + 0.5, rel=1e-4)
    assert model.serving_ms == pytest.approx(9.0 - MESSAGES * LATENCY_S * 1e3)
    assert added([Pace(one.batch, one.prompt, 10.0, 40.0) for one in decoding]) == Added(0.0, 0.0, 0.0)


def test_the_pace_of_a_batch_is_taken_where_nobody_begins_or_ends() -> None:
    def streamed(gaps: list[float], tokens: int) -> Streamed:
        times = tuple(float(at) for at in np.cumsum(gaps))
        return Streamed(Arrival(0.0, 4, tokens), 0.0, times[0], times[-1], 0.0, tokens, "", "", times)

    crowded_ends = streamed([0.09] * 5 + [0.03] * 31 + [0.09] * 4, 40)
    in_pieces = streamed([0.06] * 20, 39)
    assert steady_step_s([crowded_ends, in_pieces]) == pytest.approx(0.03)
    assert steady_step_s([in_pieces]) == pytest.approx(in_pieces.tpot_s)


def test_the_steps_of_a_probe_are_those_of_its_scenario() -> None:
    shape = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        max_len=256,
    )
    config = EngineConfig(device="cpu", block_size=4, kv_blocks=64, step_tokens_max=32, batch_max=4)
    executor = TorchExecutor.from_random(shape, config, seed=0, pool_name="unit-profile")
    try:
        probe = Probe(executor, config)
        for scenario in (
            *(Scenario((20, 7)), Scenario((), 0, 16), Scenario((), 16, 16), Scenario((9, 9), 8, 12)),
            Scenario((20, 7)),
        ):
            assert probe.fits(scenario)
            point, meant = probe.measure(scenario), features_of(scenario)
            assert point.features[2:] == meant[2:] and point.features.decodes == meant.decodes
            assert meant.context <= point.features.context <= meant.context + TRIES_MAX * meant.decodes
            assert point.median_s > 0 and point.mean_s > 0
        for scenario in (Scenario((4,) * 5), Scenario((), 0, 33), Scenario((100, 100, 60)), Scenario((250,))):
            assert not probe.fits(scenario)
    finally:
        executor.close()
