"""Instances over real vLLM, and one of our own engine beside them: what a moved, drained or orphaned request
says is what it would have said."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from local_cluster import LocalCluster, local_cluster, simulated_config
from lora_adapters import merge_adapter, write_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from llumnix.api.backend import StreamCall
from llumnix.core.admin import MigrationResult, Refusal
from llumnix.core.config import Config, EngineConfig
from llumnix.core.messages.control import MigrationOutcome
from llumnix.core.sampling import SamplingParams
from llumnix.instance.model_loader import resolve_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

START_S = 180.0
NEW_TOKENS = 40
PROMPTS = 20
STAGING_GIB = 0.035
LONG = 840
"""Tokens; more than there is staging room for."""
TEXT = "The river ran past the old mill and nobody in the village could say why it had "


def engine(kind: str, block_size: int) -> EngineConfig:
    return EngineConfig(
        kind=kind,
        model="smollm2",
        device="cpu",
        dtype="float32",
        kv_blocks=400,
        step_tokens_max=256,
        threads=1,
        max_model_len=1024,
        staging_gib=STAGING_GIB,
        engine_args=f"enforce_eager=true;block_size={block_size}" if kind == "vllm" else "",
    )


def settings(kind: str = "vllm", block_size: int = 32) -> Config:
    config = simulated_config()
    return replace(
        config,
        engine=engine(kind, block_size),
        migration=replace(config.migration, answer_timeout_s=5.0, reservation_s=15.0),
        frontend=replace(config.frontend, silent_probe_s=5.0, place_timeout_s=2.0),
    )


def with_adapters(folder: Path, block_size: int) -> Config:
    config = settings(block_size=block_size)
    modules = f"one={write_adapter(folder / 'one', 1)};two={write_adapter(folder / 'two', 2)}"
    engine = replace(config.engine, lora_modules=modules)
    return replace(config, engine=replace(engine, engine_args=f"{engine.engine_args};max_loras=2"))


def speculating(block_size: int) -> Config:
    """Up to three tokens guessed from what the request says already."""
    config = settings(block_size=block_size)
    guess = 'speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'
    return replace(config, engine=replace(config.engine, engine_args=f"{config.engine.engine_args};{guess}"))


@asynccontextmanager
async def cluster_of(*configs: Config) -> AsyncIterator[LocalCluster]:
    async with local_cluster(configs[0], instances=()) as cluster:
        await asyncio.gather(
            *(cluster.add_process(f"i{n}", config, START_S) for n, config in enumerate(configs))
        )
        await cluster.serving(len(configs))
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mixed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """Two over vLLM with different block sizes, the first with adapters, and one of our own engine."""
    adapted = with_adapters(tmp_path_factory.mktemp("adapters"), 32)
    async with cluster_of(adapted, settings(block_size=64), settings("torch")) as cluster:
        yield cluster


@contextmanager
def only(cluster: LocalCluster, *names: str) -> Iterator[None]:
    """Nothing is placed elsewhere."""
    others = cluster.processes.keys() - names
    for name in others:
        cluster.manager.set_draining(name, True)
    try:
        yield
    finally:
        for name in others:
            cluster.manager.set_draining(name, False)


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve_model("smollm2"))


def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text)["input_ids"])


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    return [tokens_of((TEXT * 6)[: 12 + 20 * n]) for n in range(PROMPTS)]


async def one(
    cluster: LocalCluster, name: str, prompt: Sequence[int], adapter: str = "", **sampling: Any
) -> tuple[int, ...]:
    params = SamplingParams(**{"max_tokens": NEW_TOKENS, "ignore_eos": True, "seed": 5, **sampling})
    stream = cluster.frontend.open(StreamCall(name, tuple(prompt), params, adapter=adapter))
    return tuple([token async for chunk in stream for token in chunk.tokens])


async def all_of(
    cluster: LocalCluster,
    name: str,
    prompts: Sequence[Sequence[int]],
    *,
    moving: bool,
    others: tuple[str, str] = ("i0", "i1"),
    **sampling: Any,
) -> tuple[list[tuple[int, ...]], int]:
    """All prompts at once; with ``moving``, running requests go to the other of two instances again and
    again. Returns outputs and committed migrations."""
    outputs = asyncio.gather(
        *(one(cluster, f"{name}{n}", prompt, seed=n, **sampling) for n, prompt in enumerate(prompts))
    )
    committed = 0
    while moving and not outputs.done():
        rows = [row for row in await cluster.manager.requests() if row.output_tokens > 0]
        results = await asyncio.gather(
            *(
                cluster.manager.migrate(row.request_id, others[row.instance_id == others[0]])
                for row in rows[:4]
            )
        )
        moved = [result for result in results if isinstance(result, MigrationResult)]
        committed += sum(result.outcome is MigrationOutcome.COMMITTED for result in moved)
        await asyncio.sleep(0.02)
    return await outputs, committed


@cache
def reference(adapter: Path | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2"), dtype=torch.float32).eval()
    if adapter is not None:
        merge_adapter(model, adapter)
    return model


def likeliest(
    prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], adapter: Path | None = None
) -> list[tuple[int, ...]]:
    """What greedy decoding gives in each place of the outputs, by the reference implementation, with a LoRA
    adapter added to its weights if one is given."""
    model = reference(adapter)
    found = []
    with torch.inference_mode():
        for prompt, output in zip(prompts, outputs, strict=True):
            scores = model(torch.tensor([[*prompt, *output]])).logits[0]
            found.append(tuple(scores[len(prompt) - 1 : -1].argmax(dim=-1).tolist()))
    return found


async def test_moved_drained_aborted_and_killed_while_vllm_speculates(prompts: Any) -> None:
    async with cluster_of(speculating(32), speculating(64)) as cluster:
        moved, committed = await all_of(cluster, "m", prompts[-6:], moving=True, temperature=0.0)
        assert committed >= 2
        await cluster.idle()
        running = asyncio.gather(
            *(one(cluster, f"d{n}", prompt, temperature=0.0) for n, prompt in enumerate(prompts[:6]))
        )
        endless = SamplingParams(max_tokens=600, seed=1, ignore_eos=True, temperature=0.0)
        gone = cluster.frontend.open(StreamCall("gone", prompts[0], endless))
        while not any(row.output_tokens for row in await cluster.manager.requests()):
            await asyncio.sleep(0.05)
        cluster.manager.set_draining("i0", True)
        while any(row.instance_id == "i0" for row in await cluster.manager.requests()):
            await asyncio.sleep(0.05)
        await gone.cancel()
        drained = await running
        await cluster.idle()
        cluster.manager.set_draining("i0", False)
        orphans = asyncio.gather(
            *(one(cluster, f"k{n}", prompt, temperature=0.0) for n, prompt in enumerate(prompts[:6]))
        )
        while not any(row.output_tokens > 3 for row in await cluster.manager.requests()):
            await asyncio.sleep(0.05)
        cluster.kill("i1")
        assert await orphans == drained
        await cluster.idle()
    assert [*drained, *moved] == likeliest([*prompts[:6], *prompts[-6:]], [*drained, *moved])


async def started(cluster: LocalCluster, name: str) -> None:
    """Wait until a request has tokens."""
    while not any(row.request_id == name and row.output_tokens for row in await cluster.manager.requests()):
        await asyncio.sleep(0.05)


async def test_moved_requests_say_the_same_with_different_block_sizes(
    prompts: Any, mixed: LocalCluster
) -> None:
    with only(mixed, "i0", "i1"):
        greedy, committed = await all_of(mixed, "g", prompts, moving=True, temperature=0.0)
        assert committed >= 4
        await mixed.idle()
        few = prompts[:6]
        drawn = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "presence_penalty": 0.3}
        still, _ = await all_of(mixed, "s", few, moving=False, **drawn)
        moved, committed = await all_of(mixed, "m", few, moving=True, **drawn)
        assert committed >= 2
        assert moved == still
        await mixed.idle()
    assert greedy == likeliest(prompts, greedy)


async def test_all_but_adapters_move_across_engines(prompts: Any, mixed: LocalCluster) -> None:
    pair = ("i0", "i2")
    with only(mixed, *pair):
        outputs, committed = await all_of(mixed, "x", prompts[:12], moving=True, others=pair, temperature=0.0)
        await mixed.idle()
        running = asyncio.ensure_future(one(mixed, "r", prompts[0], adapter="one"))
        await started(mixed, "r")
        refusal = await mixed.manager.migrate("r", "i2")
        assert isinstance(refusal, Refusal) and "i2 does not have the LoRA adapter one" in refusal.reason
        assert len(await running) == NEW_TOKENS
        await mixed.idle()
    assert committed >= 4
    assert outputs == likeliest(prompts[:12], outputs)


async def test_more_than_the_staging_room_moves_once_its_beginning_is_there(mixed: LocalCluster) -> None:
    prompt = tokens_of("Winter came early. " + TEXT * 60)[:LONG]  # nobody has a part of it
    block_bytes = mixed.hellos["i0"].kv_layout.block_bytes

    async def moved(name: str) -> tuple[tuple[int, ...], MigrationResult]:
        with only(mixed, "i0"):
            running = asyncio.ensure_future(one(mixed, name, prompt, temperature=0.0))
            await started(mixed, name)
        result = await mixed.manager.migrate(name, "i1")
        assert isinstance(result, MigrationResult)
        tokens = await running
        await mixed.idle()
        return tokens, result

    tokens, result = await moved("all")
    assert result.outcome is MigrationOutcome.REFUSED and "no room for" in result.reason
    with only(mixed, "i1"):
        await one(mixed, "beginning", prompt, max_tokens=1)
    again, result = await moved("rest")
    assert result.outcome is MigrationOutcome.COMMITTED, result
    assert 0 < result.kv_bytes <= 8 * block_bytes
    assert again == tokens
    assert [tokens] == likeliest([prompt], [tokens])
