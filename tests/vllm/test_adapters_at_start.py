"""What an instance does about its LoRA adapters when it starts. Those of the user are tried. The one of zeros
that vLLM's CPU build needs is in the user's cache, once for all instances that need the same, so that none of
them leaves one behind."""

import json
from pathlib import Path

import pytest
import torch
from lora_adapters import RANK, Adapted, write_adapter
from safetensors.torch import load_file
from small_llama import ADAPTED, small_llama

from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError
from llumnix.instance.vllm_engine import VllmEngine
from llumnix.instance.vllm_lora import LoraRequests

SMALL = Adapted(2, {"self_attn.q_proj": (16, 8)})


def blank(*folders: Path) -> Path:
    modules = ";".join(f"a{number}={folder}" for number, folder in enumerate(folders))
    request = LoraRequests(EngineConfig(kind="vllm", lora_modules=modules), 2).request("")
    assert request is not None
    return Path(request.lora_path)


def test_equal_blanks_are_one_and_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = (write_adapter(tmp_path / str(seed), seed, SMALL) for seed in (1, 2))
    wider = write_adapter(tmp_path / "wider", 1, Adapted(2, {"self_attn.q_proj": (32, 8)}))
    found = blank(first, second)
    assert blank(second) == found != blank(wider)
    assert found.is_relative_to(tmp_path / "cache" / "llumnix" / "blank-adapters")
    weights = load_file(found / "adapter_model.safetensors")
    assert {weight.shape for weight in weights.values()} == {(RANK, 16), (8, RANK)}
    assert not any(torch.any(weight) for weight in weights.values())


def test_an_adapter_that_vllm_does_not_take_is_refused_by_name(tmp_path: Path) -> None:
    names = ("one", "two")
    folders = {name: write_adapter(tmp_path / name, seed, ADAPTED) for seed, name in enumerate(names)}
    file = folders["two"] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    config = EngineConfig(
        kind="vllm",
        model=small_llama(tmp_path / "model"),
        device="cpu",
        kv_blocks=40,
        max_model_len=512,
        staging_gib=0.02,
        threads=1,
        lora_modules=";".join(f"{name}={folder}" for name, folder in folders.items()),
        engine_args="enforce_eager=true",
    )
    reason = r"lora_modules: two: vLLM does not take it: .*DoRA"
    with pytest.raises(ConfigurationError, match=reason) as caught:
        VllmEngine(config, "never")
    assert "\n" not in str(caught.value)


def test_an_adapter_without_matrices_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_adapter(tmp_path / "empty", 1, Adapted(0, {}))
    with pytest.raises(ConfigurationError, match="no pair of LoRA matrices"):
        blank(folder)
