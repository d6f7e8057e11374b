"""LoRA adapters on real vLLM engines: a request that moves, or whose instance is killed, goes on with its
adapter and says what the model with that adapter's weights added says, whatever else is in its batch; one
adapter never finds another's KV."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from local_cluster import LocalCluster
from lora_adapters import write_adapter
from test_vllm_cluster import cluster_of, likeliest, settings

from llumnix.api.backend import StreamCall
from llumnix.core.admin import MigrationResult, Refusal
from llumnix.core.config import Config
from llumnix.core.messages.control import MigrationOutcome
from llumnix.core.sampling import SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPT = tuple(range(1000, 1070))  # longer than two blocks of vLLM: its prefix cache has something to confuse
NAMES = ("", "one", "two")
"""The model alone among them: vLLM's CPU build would compute its rows with the adapter in the last slot."""
NEW_TOKENS = 32


def with_adapters(folder: Path, block_size: int) -> Config:
    config = settings(block_size=block_size)
    modules = f"one={write_adapter(folder / 'one', 1)};two={write_adapter(folder / 'two', 2)}"
    engine = replace(config.engine, lora_modules=modules)
    return replace(config, engine=replace(engine, engine_args=f"{engine.engine_args};max_loras=2"))


async def say(cluster: LocalCluster, name: str, adapter: str) -> tuple[int, ...]:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, seed=5, temperature=0.0)
    stream = cluster.frontend.open(StreamCall(f"{name}-{adapter}", PROMPT, params, adapter=adapter))
    return tuple([token async for chunk in stream for token in chunk.tokens])


async def all_of(cluster: LocalCluster, name: str) -> list[tuple[int, ...]]:
    return list(await asyncio.gather(*(say(cluster, name, adapter) for adapter in NAMES)))


async def move_all(cluster: LocalCluster, pending: "asyncio.Task[Sequence[object]]") -> int:
    """Send every running request to the other instance, again and again; committed migrations."""
    committed = 0
    while not pending.done():
        rows = [row for row in await cluster.manager.requests() if row.output_tokens]
        moves = [(row.request_id, "i1" if row.instance_id == "i0" else "i0") for row in rows]
        results = await asyncio.gather(*(cluster.manager.migrate(*move) for move in moves))
        committed += sum(
            isinstance(one, MigrationResult) and one.outcome is MigrationOutcome.COMMITTED for one in results
        )
        await asyncio.sleep(0.02)
    return committed


@pytest.mark.asyncio
async def test_adapters_move_with_their_requests_and_outlive_an_instance(tmp_path: Path) -> None:
    configs = with_adapters(tmp_path, 32), with_adapters(tmp_path, 64)
    async with cluster_of(*configs) as cluster:
        still = await all_of(cluster, "still")
        assert len(set(still)) == 3, "the adapters change nothing"
        await cluster.idle()
        moving = asyncio.ensure_future(all_of(cluster, "moved"))
        assert await move_all(cluster, moving) >= 3
        assert await moving == still
        await cluster.idle()
        known = {name for row in cluster.manager.instances() for name in row.adapters}
        assert known == {"one", "two"}
        orphans = asyncio.ensure_future(all_of(cluster, "orphan"))
        while not any(row.output_tokens > 3 for row in await cluster.manager.requests()):
            await asyncio.sleep(0.05)
        cluster.kill("i0")
        assert await orphans == still
        await cluster.idle()
    for adapter, tokens in zip(NAMES, still, strict=True):
        folder = tmp_path / adapter if adapter else None
        assert likeliest([PROMPT], [tokens], folder) == [tokens], adapter


@pytest.mark.asyncio
async def test_an_instance_of_our_own_engine_beside_it_gets_none_of_them(tmp_path: Path) -> None:
    async with cluster_of(with_adapters(tmp_path, 32), settings("torch")) as cluster:
        running = asyncio.ensure_future(say(cluster, "r", "one"))
        while not any(row.output_tokens for row in await cluster.manager.requests()):
            await asyncio.sleep(0.05)
        refusal = await cluster.manager.migrate("r-one", "i1")
        assert isinstance(refusal, Refusal) and "i1 does not have the LoRA adapter one" in refusal.reason
        assert len(await running) == NEW_TOKENS
        await cluster.idle()
