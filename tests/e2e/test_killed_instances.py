"""Instances killed with SIGKILL at any moment, a migration's commit included: clients must not notice."""

import asyncio
import random

import pytest
from local_cluster import LocalCluster, expected, local_cluster, simulated_config, stream

pytestmark = pytest.mark.e2e

STREAMS = 10
TOKENS = 400


async def shove(cluster: LocalCluster, victim: str, rng: random.Random) -> None:
    """Start migrations into and out of the victim, so that the kill meets them in every state."""
    rows = [row for row in await cluster.manager.requests() if row.output_tokens > 0]
    others = [name for name in cluster.processes if name != victim]
    orders = []
    for row in rows:
        target = victim if row.instance_id != victim else rng.choice(others)
        orders.append(asyncio.create_task(cluster.manager.migrate(row.request_id, target)))
    await asyncio.sleep(rng.uniform(0.0, 0.04))
    for order in orders:
        order.add_done_callback(lambda done: done.cancelled() or done.exception())


@pytest.mark.asyncio
@pytest.mark.parametrize(("transport", "rounds"), [("shm", 3), ("zmq", 2)])
async def test_requests_of_killed_instances_continue_without_a_missing_or_doubled_token(
    transport: str, rounds: int
) -> None:
    rng = random.Random(7)
    config = simulated_config(transport=transport)
    async with local_cluster(config, ("i0", "i1", "i2"), processes=True) as cluster:
        for number in range(rounds):
            seeds = range(number * STREAMS, (number + 1) * STREAMS)
            streams = [
                asyncio.create_task(stream(cluster.frontend, f"r{n}", tokens=TOKENS, prompt=30 + n, seed=n))
                for n in seeds
            ]
            await asyncio.sleep(0.4)
            victim = sorted(cluster.processes)[number % 3]
            await shove(cluster, victim, rng)
            cluster.kill(victim)
            restarted = asyncio.create_task(cluster.add_process(victim))
            outputs = await asyncio.gather(*streams)
            assert outputs == [expected(tokens=TOKENS, prompt=30 + n, seed=n) for n in seeds]
            await restarted
        # In some round the victim may just have given all its requests away, but not in every one.
        assert cluster.frontend.table.stats.continued > 0, "no kill mattered"
        await cluster.idle()
