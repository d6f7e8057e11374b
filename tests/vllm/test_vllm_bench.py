"""The benchmarks over vLLM, with tiny settings: that they run, and what they write down."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from llumnix.bench import migration, vllm_layer
from llumnix.bench.migration_processes import ProcessPair, llama_json
from llumnix.instance.models.config import ModelConfig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

LENGTH = 512


def test_a_migration_between_two_vllm_instances_is_measured() -> None:
    config = migration.benchmark_config("cpu", "auto", "vllm")
    measured = migration._measure(config, ProcessPair, (LENGTH,), 3, 0, recompute=True)[LENGTH]
    row, more = migration._result(LENGTH, measured, measured), migration._detail(LENGTH, measured, measured)
    assert more["migrations"] == 3 and row["kv_bytes"] > 0 and row["stages"] >= 1
    for name, value in (row | more).items():
        assert all(map(math.isfinite, value if isinstance(value, list) else [value])), name


def test_an_instance_is_measured_beside_plain_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=64,
        max_len=4096,
    )
    (tmp_path / "config.json").write_text(json.dumps(llama_json(shape)))
    config = vllm_layer.benchmark_config(str(tmp_path), "float32", 1)
    arguments = f"{config.engine_args};load_format=dummy;enforce_eager=true"
    monkeypatch.setattr(vllm_layer, "BATCHES", (1, 2))
    report = vllm_layer.measure(
        replace(config, engine_args=arguments, kv_blocks=128), steps=4, repeats=2, seed=0
    )
    assert [row["batch"] for row in report["results"]] == [1, 2]
    for row in report["results"]:
        assert row["tokens_per_s"] > 0 and row["plain_tokens_per_s"] > 0
        assert len(row["ratios"]) == 2 and min(row["ratios"]) > 0
    vllm_layer.show(report)
