"""The benchmarks on real clusters, end to end: everything is real but the model."""

import json
from pathlib import Path

import pytest

from llumnix.cli.main import main
from llumnix.sim.cost import LLAMA_7B_A10, to_json

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

CLUSTER = ("--engine", "simulated", "--simulated-step-ms", "5", "--instances", "2", "--kv-blocks", "80")
LOAD = ("--requests", "12", "--rate", "20", "--shrink", "16", "--repeats", "1")


def test_modes_are_compared_on_one_cluster(tmp_path: Path) -> None:
    out = tmp_path / "live.json"
    assert main(["bench", "live", "--compare", "priorities", *LOAD, *CLUSTER, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    modes = [(row["mode"], row["all"]["requests"], row["runs"]) for row in report["results"]]
    assert modes == [("migration on", 12, 1), ("priorities", 12, 1)]
    for row in report["results"]:
        assert row["high"]["requests"] + row["normal"]["requests"] == 12
        assert 0 < row["all"]["ttft_ms"]["p50"] <= row["all"]["ttft_ms"]["p99"]
    assert [gain["requests"] for gain in report["gains"]] == ["all", "high", "normal"]


def test_a_workload_runs_on_a_cluster_and_in_the_simulator(tmp_path: Path) -> None:
    cost, out = tmp_path / "cost.json", tmp_path / "validation.json"
    cost.write_text(to_json(LLAMA_7B_A10))
    options = ("--cost-model", str(cost), "--json", str(out))
    assert main(["bench", "validation", *LOAD, *CLUSTER, *options]) == 0
    report = json.loads(out.read_text())
    assert len(report["requests"]) == 12 and len(report["results"]) == 4
    for row in report["results"]:
        assert row["off"] == round(row["simulated_ms"] / row["real_ms"] - 1, 4)
