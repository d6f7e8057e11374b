"""Arithmetic and refusals of tensor parallelism: heads of ranks, devices of hosts, settings."""

import json
from pathlib import Path

import pytest

from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError
from llumnix.instance.vllm_arguments import parse_arguments
from llumnix.instance.vllm_heads import check_heads, heads_of_rank
from llumnix.instance.vllm_model import read_facts
from llumnix.runtime.reservations import bundle, check_hosts


@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 3), (2, 4), (4, 4), (8, 2), (3, 3), (8, 1)])
def test_every_head_is_copied_out_by_one_rank_and_each_rank_has_its_own(ranks: int, kv_heads: int) -> None:
    parts = [heads_of_rank(rank, ranks, kv_heads) for rank in range(ranks)]
    copied = [
        head for part in parts if part.copies_out for head in range(part.first, part.first + part.count)
    ]
    assert copied == list(range(kv_heads))
    assert {part.count for part in parts} == {max(1, kv_heads // ranks)}
    assert all(part.first == rank * kv_heads // ranks for rank, part in enumerate(parts))


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "complaint"),
    [
        (2, 9, 3, "tensor_parallel 2 does not divide the model's 9 attention heads"),
        (4, 12, 3, "tensor_parallel 4 neither divides the model's 3 KV heads nor is a multiple"),
        (16, 8, 8, "does not divide the model's 8 attention heads"),
    ],
)
def test_degrees_that_a_model_does_not_allow(ranks: int, heads: int, kv_heads: int, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        check_heads(ranks, heads, kv_heads)


def test_frontends_refuse_by_the_models_configuration(tmp_path: Path) -> None:
    described = {"vocab_size": 100, "num_attention_heads": 8, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert read_facts(tmp_path, 4).vocab_size == 100
    with pytest.raises(ConfigurationError, match="tensor_parallel 3 does not divide"):
        read_facts(tmp_path, 3)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, "n_head": 8}))
    assert read_facts(tmp_path, 3).vocab_size == 100, "vLLM itself knows what else there may be"


def test_engines_on_one_device_refuse_it() -> None:
    for kind in ("torch", "simulated"):
        with pytest.raises(ConfigurationError, match=f"tensor_parallel needs engine vllm: engine {kind}"):
            EngineConfig(kind=kind, tensor_parallel=2)
    with pytest.raises(ConfigurationError, match="tensor_parallel must be within 1 and 64, got 0"):
        EngineConfig(kind="vllm", tensor_parallel=0)
    with pytest.raises(ConfigurationError, match="use --tensor-parallel"):
        parse_arguments("tensor_parallel_size=2")
    with pytest.raises(ConfigurationError, match="an instance does not span hosts"):
        parse_arguments("nnodes=2")


def test_one_bundle_holds_all_gpus_of_an_instance() -> None:
    assert bundle(4, on_gpus=True)["GPU"] == 4
    assert "GPU" not in bundle(4, on_gpus=False)


def test_an_instance_that_fits_on_no_host_is_refused() -> None:
    check_hosts(2, [1, 2, 0])
    for gpus, most in (([1, 1, 1], 1), ([], 0)):
        with pytest.raises(ConfigurationError, match=rf"does not span hosts, .* more than {most} GPUs"):
            check_hosts(2, gpus)
