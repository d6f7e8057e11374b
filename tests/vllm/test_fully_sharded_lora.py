"""LoRA adapters whose both matrices are shared out to the ranks (vLLM's ``fully_sharded_loras``): beside an
instance of one rank that has them whole, requests move both ways and say what the reference with the adapter
in its weights says, base requests in the same batch too."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import write_adapter
from small_llama import ADAPTED, small_llama
from test_tensor_parallel import children, likeliest, meeting_files, settings
from test_vllm_engine import Run, spec
from test_vllm_quantised import move

from llumnix.core.messages.serving import RequestSpec
from llumnix.instance.vllm_engine import VllmEngine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

NAMES = ("", "one", "two")
PROMPTS = [tuple(range(100 + 7 * n, 130 + 30 * n)) for n in range(len(NAMES))]
"""Those that the reference of test_tensor_parallel.py is asked with."""
NEW_TOKENS = 60
SHARDED = ";fully_sharded_loras=true"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, seed, ADAPTED) for seed, name in enumerate(NAMES) if name}


@pytest.fixture(scope="module")
def engines(model: str, adapters: dict[str, Path]) -> Iterator[tuple[VllmEngine, VllmEngine]]:
    """Of one rank, and of two; closed in order they leave no file behind."""
    configs = [settings(model, 1, adapters=adapters), settings(model, 2, adapters=adapters, more=SHARDED)]
    one, two = (VllmEngine(config.engine, f"sharded-{os.getpid()}-{n}") for n, config in enumerate(configs))
    files = meeting_files(children(os.getpid()))
    yield one, two
    two.close()
    one.close()
    assert not any(file.exists() for file in files)


def kinds(model: torch.nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def asked(name: str, adapter: str, prompt: tuple[int, ...]) -> RequestSpec:
    return replace(spec(name, prompt, max_tokens=NEW_TOKENS), adapter=adapter)


def test_both_matrices_are_shared_out_and_requests_move(
    engines: tuple[VllmEngine, VllmEngine], model: str, adapters: dict[str, Path]
) -> None:
    one, two = engines
    found: list[set[str]] = two._core._vllm.apply_model(kinds)
    assert all(any("ShardedLoRA" in kind for kind in rank) for rank in found) and len(found) == 2
    requests: list[Any] = [
        asked(f"r{n}", adapter, prompt)
        for n, (adapter, prompt) in enumerate(zip(NAMES, PROMPTS, strict=True))
    ]
    run = Run(one, *requests)
    for source, target in ((one, two), (two, one), (one, two)):
        run.step(9)
        for request in requests:
            move(request.request_id, source, target)
        run.engine = target
    said = [tuple(run.out()[request.request_id]) for request in requests]
    assert {len(tokens) for tokens in said} == {NEW_TOKENS} and not one.has_work()
    assert said == likeliest(model, said, [adapters.get(name) for name in NAMES])
