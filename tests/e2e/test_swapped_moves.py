"""A real model whose requests are swapped out at every step and moved between two instances all the while:
what they say is what they would have said, and KV that travelled is not computed again."""

import asyncio
from dataclasses import replace

import pytest
from local_cluster import LocalCluster, local_cluster, simulated_config

from llumnix.api.backend import StreamCall
from llumnix.core.admin import MigrationResult
from llumnix.core.config import Config, EngineConfig, SwapConfig
from llumnix.core.messages.control import MigrationOutcome, RequestStatus
from llumnix.core.sampling import SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

NEW_TOKENS = 40
REQUESTS = 10
CROWDS_MAX = 25  # most crowds do it; on a busy machine several in a row may not


def config(transport: str, *, swapping: bool) -> Config:
    """One instance holds about a third of the requests; with ``swapping`` ranks are drawn for every step."""
    engine = EngineConfig(
        model="smollm2", device="cpu", dtype="float32", threads=1, block_size=8,
        kv_blocks=40 if swapping else 200, max_model_len=160, step_tokens_max=96,
    )  # fmt: skip
    base = simulated_config(transport=transport)
    swap = SwapConfig(host_blocks=200, rerank_frequency=1.0, rerank_by="random")
    return replace(
        base,
        engine=engine,
        swap=swap if swapping else SwapConfig(),
        scheduler=replace(base.scheduler, preemption_policy="swap"),
    )


async def generate(cluster: LocalCluster, crowd: int = 0) -> "asyncio.Future[list[tuple[int, ...]]]":
    """The same requests every time, but for their ids."""

    async def one(number: int) -> tuple[int, ...]:
        prompt = tuple(100 + (number * 37 + index * 13) % 900 for index in range(30 + 5 * number))
        sampling = SamplingParams(max_tokens=NEW_TOKENS, seed=number, temperature=0.0, ignore_eos=True)
        stream = cluster.frontend.open(StreamCall(f"r{crowd}-{number}", prompt, sampling))
        return tuple([token async for chunk in stream for token in chunk.tokens])

    return asyncio.gather(*(one(number) for number in range(REQUESTS)))


async def move_swapped(cluster: LocalCluster, until: "asyncio.Future[list[tuple[int, ...]]]") -> int:
    """Send whoever is swapped out to the other instance, again and again; how many arrived with their KV."""
    with_kv = 0
    while not until.done():
        rows = [row for row in await cluster.manager.requests() if row.status is RequestStatus.SWAPPED]
        results = await asyncio.gather(
            *(
                cluster.manager.migrate(row.request_id, "i1" if row.instance_id == "i0" else "i0")
                for row in rows[:3]
            )
        )
        for result in results:
            if isinstance(result, MigrationResult) and result.outcome is MigrationOutcome.COMMITTED:
                with_kv += result.kv_bytes > 0
        await asyncio.sleep(0.005)
    return with_kv


@pytest.mark.asyncio
async def test_float32_tokens_are_the_same_swapped_and_moved_or_not() -> None:
    async with local_cluster(config("auto", swapping=False)) as cluster:
        still = await (await generate(cluster))
    for transport in ("auto", "zmq"):
        async with local_cluster(config(transport, swapping=True)) as cluster:
            with_kv = 0
            for crowd in range(CROWDS_MAX):
                outputs = await generate(cluster, crowd)
                with_kv += await move_swapped(cluster, outputs)
                assert await outputs == still
                if with_kv:
                    break
            await cluster.idle()
        assert with_kv, f"none of {CROWDS_MAX} times {REQUESTS} requests took its KV along"
