"""What a vLLM instance has of a request in its prefix cache is not copied to it, and dispatch prefers it for
what goes on from there; what another LoRA adapter computed does not count."""

import asyncio
from pathlib import Path

import pytest
from local_cluster import LocalCluster
from test_vllm_cluster import cluster_of
from test_vllm_lora import with_adapters

from llumnix.api.backend import StreamCall
from llumnix.core.admin import DecisionRow, MigrationResult
from llumnix.core.messages.control import MigrationOutcome
from llumnix.core.sampling import SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PREFIX = tuple(range(1000, 1500))
NEW_TOKENS = 120


async def said(cluster: LocalCluster, name: str, adapter: str, end: tuple[int, ...]) -> tuple[int, ...]:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, seed=5, temperature=0.0)
    stream = cluster.frontend.open(StreamCall(name, PREFIX + end, params, adapter=adapter))
    return tuple([token async for chunk in stream for token in chunk.tokens])


async def moved(
    cluster: LocalCluster, name: str, adapter: str, end: tuple[int, ...] = ()
) -> tuple[tuple[int, ...], int]:
    """What a request says that goes to the other instance on its way, and the bytes that travelled."""
    pending = asyncio.create_task(said(cluster, name, adapter, end))
    while not (rows := [row for row in await cluster.manager.requests() if row.output_tokens]):
        assert not pending.done()
        await asyncio.sleep(0.01)
    (row,) = rows
    result = await cluster.manager.migrate(row.request_id, "i1" if row.instance_id == "i0" else "i0")
    assert isinstance(result, MigrationResult)
    assert result.outcome is MigrationOutcome.COMMITTED, result.reason
    return await pending, result.kv_bytes


def explained(cluster: LocalCluster, name: str) -> tuple[DecisionRow, ...]:
    found = cluster.manager.explain(name)
    assert isinstance(found, tuple)
    return found


@pytest.mark.asyncio
async def test_blocks_in_the_targets_prefix_cache_do_not_travel(tmp_path: Path) -> None:
    async with cluster_of(with_adapters(tmp_path, 32), with_adapters(tmp_path, 64)) as cluster:
        first, all_of_it = await moved(cluster, "a", "one")
        again, rest = await moved(cluster, "b", "one")
        assert again == first
        assert 0 < rest < all_of_it / 3
        other, all_again = await moved(cluster, "c", "two")
        assert other != first
        assert all_again > 0.9 * all_of_it
        end = (7, 8, 9)
        tokens, rest = await moved(cluster, "d", "one", end)
        assert 0 < rest < all_of_it / 3
        assert tokens == await said(cluster, "e", "one", end)
        (ended_on,) = {row.instance_id for row in explained(cluster, "d") if row.kind == "committed"}
        await said(cluster, "f", "one", (*end, *tokens, 5))
        placed = explained(cluster, "f")[0]
        assert placed.instance_id == ended_on and placed.reason.startswith("keeps"), placed
