"""LoRA adapters on real vLLM engines: a request that moves, or whose instance is killed, goes on with its
adapter and says what the model with that adapter's weights added says, whatever else is in its batch. What an
instance has of a request in its prefix cache is not copied to it, and dispatch prefers it for what goes on
from there; what another adapter computed does not count."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio
from local_cluster import LocalCluster, local_cluster
from test_vllm_cluster import START_S, likeliest, one, with_adapters

from llumnix.api.backend import StreamCall
from llumnix.core.admin import DecisionRow, MigrationResult
from llumnix.core.messages.control import MigrationOutcome
from llumnix.core.sampling import SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PREFIX, LONG = tuple(range(1000, 1500)), 120
PROMPT = tuple(range(2000, 2070))  # longer than two blocks of vLLM: its prefix cache has something to confuse
NAMES = ("", "one", "two")
"""The model alone among them: vLLM's CPU build would compute its rows with the adapter in the last slot."""
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(folder: Path) -> AsyncIterator[LocalCluster]:
    """The first in a process of its own, to be killed; this one has vLLM imported, which takes longest."""
    async with local_cluster(with_adapters(folder, 64), instances=()) as cluster:
        killed = cluster.add_process("i0", with_adapters(folder, 32), START_S)
        await asyncio.gather(killed, cluster.add_instance("i1"))
        await cluster.serving(2)
        yield cluster


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


async def said(cluster: LocalCluster, name: str, adapter: str, end: tuple[int, ...]) -> tuple[int, ...]:
    params = SamplingParams(max_tokens=LONG, ignore_eos=True, seed=5, temperature=0.0)
    stream = cluster.frontend.open(StreamCall(name, PREFIX + end, params, adapter=adapter))
    return tuple([token async for chunk in stream for token in chunk.tokens])


async def moved(
    cluster: LocalCluster, name: str, adapter: str, end: tuple[int, ...] = ()
) -> tuple[tuple[int, ...], int]:
    """What a request says that goes to the other instance on its way, and the bytes that travelled."""
    pending = asyncio.create_task(said(cluster, name, adapter, end))
    while True:
        rows = [row for row in await cluster.manager.requests() if row.output_tokens]
        moves = [(row.request_id, "i1" if row.instance_id == "i0" else "i0") for row in rows]
        results = [await cluster.manager.migrate(*move) for move in moves]
        for result in results:
            if isinstance(result, MigrationResult) and result.outcome is MigrationOutcome.COMMITTED:
                return await pending, result.kv_bytes
        assert not pending.done(), results
        await asyncio.sleep(0.01)


def explained(cluster: LocalCluster, name: str) -> tuple[DecisionRow, ...]:
    found = cluster.manager.explain(name)
    assert isinstance(found, tuple)
    return found


@pytest.mark.asyncio(loop_scope="module")
async def test_blocks_in_the_targets_prefix_cache_do_not_travel(cluster: LocalCluster) -> None:
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
    cluster.manager.set_draining("i0", True)
    turn = tuple(range(5000, 5200))
    answer = await one(cluster, "f", turn, adapter="one", temperature=0.0)
    cluster.manager.set_draining("i0", False)
    await one(cluster, "g", (*turn, *answer, 5), adapter="one", temperature=0.0)
    placed = explained(cluster, "g")[0]
    assert placed.instance_id == "i1" and placed.reason.startswith("keeps"), placed


@pytest.mark.asyncio(loop_scope="module")
async def test_adapters_move_with_their_requests_and_outlive_an_instance(
    cluster: LocalCluster, folder: Path
) -> None:
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
        weights = folder / adapter if adapter else None
        assert likeliest([PROMPT], [tokens], weights) == [tokens], adapter
