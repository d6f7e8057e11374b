"""Benchmarks against a real cluster, without one: what they ask for, and what they make of the answers."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llumnix.bench import vllm_serving
from llumnix.bench.live import COMPARISONS, Run, gains_of, results_of
from llumnix.bench.live_load import Load, RealCluster, Streamed
from llumnix.bench.live_model import cut_model
from llumnix.bench.machine import OthersCpu
from llumnix.bench.validation import (
    BASE,
    SIMULATED_RUNS,
    Seen,
    compare,
    run_simulated,
    simulate_runs,
)
from llumnix.core.errors import ConfigurationError, LlumnixError
from llumnix.sim.cost import LLAMA_7B_A10
from llumnix.sim.workload import Arrival


def test_a_load_is_the_same_for_its_seed_and_keeps_within_the_model() -> None:
    load = Load("sharegpt", 4.0, rate=5.0, cv=2.0, count=2000)
    arrivals = load.arrivals(512, seed=3)
    assert arrivals == load.arrivals(512, seed=3) != load.arrivals(512, seed=4)
    assert all(one.prompt_tokens >= 1 and one.output_tokens >= 2 for one in arrivals)
    assert max(one.prompt_tokens + one.output_tokens for one in arrivals) <= 512
    assert arrivals[-1].at_s == pytest.approx(2000 / 5.0, rel=0.15)
    middle = sorted(one.output_tokens for one in arrivals)[1000]
    assert middle == pytest.approx(487 / 4, rel=0.05)  # ShareGPT's median answer, shortened
    with pytest.raises(ConfigurationError, match="--rate must be above 0, got 0"):
        Load("sharegpt", 4.0, rate=0, cv=1.0, count=5)


def test_percentiles_are_compared_with_all_real_runs_together() -> None:
    runs = [Seen((0.1,) * 100, (0.01,) * 100), Seen((0.3,) * 100, (0.01,) * 100)]
    rows = compare(runs, [Seen((one,) * 100, (0.012,) * 100) for one in (0.22, 0.22, 0.11)])
    by_name = {(row["latency"], row["percentile"]): row for row in rows}
    assert by_name["ttft", "p50"]["off"] == pytest.approx(0.1)
    assert by_name["ttft", "p50"]["real_apart"] == pytest.approx(0.5)
    assert by_name["ttft", "p50"]["simulated_apart"] == pytest.approx(0.5)
    assert by_name["ttft", "p50"]["real_scatter"] == pytest.approx(0.5 * 2**0.5, rel=1e-3)
    assert by_name["tpot", "p50"]["simulated_scatter"] == 0.0
    alone = compare(runs[:1], runs[:1])[0]
    assert alone["real_scatter"] is None and alone["off"] == 0.0
    assert by_name["tpot", "p99"]["off"] == pytest.approx(0.2)
    assert by_name["tpot", "p99"]["real_apart"] == 0.0


def test_simulated_runs_differ_as_real_ones_do_and_keep_their_requests_apart() -> None:
    arrivals = Load("burstgpt", 8.0, rate=10.0, cv=1.0, count=60).arrivals(1024, seed=1)
    cost = replace(LLAMA_7B_A10, max_model_len=2048)
    runs, counted = simulate_runs(BASE, cost, arrivals, [0.001, 0.004, 0.3], seed=1)
    assert len(runs) == len(counted["migrations"]) == SIMULATED_RUNS
    assert len({run.ttft_s for run in runs}) == SIMULATED_RUNS
    again = simulate_runs(BASE, cost, arrivals, [0.001, 0.004, 0.3], seed=1)[0]
    assert [run.ttft_s for run in again] == [run.ttft_s for run in runs]
    longest = max(range(60), key=lambda number: arrivals[number].prompt_tokens)
    least_s = cost.step_s(0, 0, arrivals[longest].prompt_tokens, 0)
    assert all(run.ttft_s[longest] >= least_s for run in runs)  # late ones overtake: results find back
    exact = [run_simulated(BASE, cost, arrivals, seed=1)[0].ttft_s] * SIMULATED_RUNS
    on_time = [run.ttft_s for run in simulate_runs(BASE, cost, arrivals, [0.0], seed=1)[0]]
    assert on_time == exact


def test_a_request_refused_in_virtual_time_is_no_latency() -> None:
    """Refused ones counted as first tokens before they were asked for."""
    arrivals = Load("burstgpt", 8.0, rate=10.0, cv=1.0, count=60).arrivals(1024, seed=1)
    tight = replace(BASE, engine=replace(BASE.engine, batch_max=1, waiting_max=1))
    with pytest.raises(LlumnixError, match="answers failed in virtual time"):
        run_simulated(tight, replace(LLAMA_7B_A10, max_model_len=2048), arrivals, seed=1)


def answer(scale: float) -> Streamed:
    return Streamed(Arrival(0.0, 8, 11), 0.0, scale, 2 * scale, scale / 5, 11, "")


def test_modes_are_compared_over_their_repeats_and_by_priority() -> None:
    without, used = COMPARISONS["priorities"][0]
    high, moves = (True, False, False), (0, 0, 1)
    runs = [
        *(Run(without, (answer(4.0),) * 3, high, (0, 0, 0), 2, 1) for _ in range(2)),
        *(Run(used, (answer(0.8), answer(5.0), answer(5.2)), high, moves, 1, 3) for _ in range(2)),
    ]
    rows = results_of(runs, "priorities")
    assert [(row["preemptions"], row["migrations"], row["runs"]) for row in rows] == [(4, 2, 2), (2, 6, 2)]
    assert [row["high"]["requests"] for row in rows] == [2, 2]
    assert rows[0]["all"]["tpot_ms"]["p50"] == pytest.approx(400.0)
    gains = {gain["requests"]: gain for gain in gains_of(rows, "priorities")}
    assert gains["high"]["ttft_ms"]["p99"] == pytest.approx(5.0)
    assert gains["normal"]["ttft_ms"]["p99"] == pytest.approx(4.0 / 5.2, rel=0.01)
    assert [one["ttft_ms"] for one in gains["all"]["each_run_p99"]] == pytest.approx([0.77, 0.77], rel=0.01)
    assert [(row["queued"], row["stopped"]) for row in rows] == [(6, 0), (4, 4)]
    assert rows[1]["slowest"] == {"answers": 1, "short": 0, "stopped": 1, "moved": 1}


def test_a_cut_model_has_its_first_layers_and_what_is_of_none(tmp_path: Path) -> None:
    names = ["model.embed_tokens.weight", *(f"model.layers.{layer}.norm.weight" for layer in range(12))]
    save_file({name: torch.ones(2) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 12, "hidden_size": 2}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with cut_model(str(tmp_path), 2) as folder:
        assert json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"] == 2
        assert (Path(folder) / "tokenizer.json").is_file()
        assert sorted(load_file(Path(folder) / "model.safetensors")) == names[:3]
    assert not Path(folder).exists()
    with pytest.raises(ConfigurationError, match=r"--layers 13: .* has 12"), cut_model(str(tmp_path), 13):
        pass


def test_a_client_that_does_not_finish_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the time in which it sends its requests, and some more."""
    given: list[float] = []

    def run(command: list[str], *, timeout: float, **_: object) -> None:
        given.append(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(vllm_serving.subprocess, "run", run)
    config = vllm_serving.settings()
    here = replace(config, engine=replace(config.engine, model=str(Path(__file__).parent)))
    with pytest.raises(LlumnixError, match="did not finish within 640 s"):
        vllm_serving._client(RealCluster("http://127.0.0.1:1"), here, 1000, 2.5, 0)
    assert given == [640.0]


def test_the_processors_others_use_are_a_share() -> None:
    assert OthersCpu().share() >= 0.0
