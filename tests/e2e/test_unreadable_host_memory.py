"""Swapped-out requests whose KV the target cannot reach: they move all the same, without it, and the event
log says why. Real processes' memory, real sockets."""

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
from local_cluster import LocalCluster, expected, local_cluster, simulated_config, stream

from llumnix.core.admin import MigrationResult
from llumnix.core.config import Config, SwapConfig
from llumnix.core.messages.control import RequestStatus
from llumnix.runtime.instance_factory import Instance

pytestmark = pytest.mark.e2e

REQUESTS, TOKENS = 8, 150


def config(transport: str) -> Config:
    """One instance holds about half of the requests; ranks are drawn anew every tenth step."""
    base = simulated_config(kv_blocks=48, transport=transport)
    return replace(
        base,
        swap=SwapConfig(host_blocks=200, rerank_frequency=0.1, rerank_by="random"),
        scheduler=replace(base.scheduler, preemption_policy="swap"),
    )


def close_file(instance: Instance) -> None:
    """Its host memory stays mapped, but nobody can open the file any more."""
    host = instance._holder.host_pool
    assert host is not None
    os.close(host.fd)
    host.fd = -1


def refuse(instance: Instance) -> None:
    """Its block server knows nothing of host memory."""
    host = instance._holder.host_pool
    assert host is not None
    del instance._blocks._pools[host.pool_name]


def nobody_listens(instance: Instance) -> None:
    """Its host memory is said to be served at a port that is closed."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    outgoing = instance.server._agent._outgoing
    host = outgoing._me.host_endpoint
    assert host is not None
    outgoing._me = replace(outgoing._me, host_endpoint=replace(host, address=f"tcp://127.0.0.1:{port}"))


async def move_swapped(cluster: LocalCluster) -> MigrationResult:
    """Send whoever is swapped out at i0 to i1 until one arrives without its KV. One that was swapped in
    before its order came moves as others do."""
    async with asyncio.timeout(20):
        while True:
            rows = [row for row in await cluster.manager.requests() if row.status is RequestStatus.SWAPPED]
            for row in rows:
                if row.instance_id == "i0":
                    result = await cluster.manager.migrate(row.request_id, "i1")
                    moved = isinstance(result, MigrationResult) and result.outcome == "committed"
                    if moved and result.kv_bytes == 0:
                        return result
            await asyncio.sleep(0.005)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("transport", "break_it", "why"),
    [
        ("shm", close_file, "cannot be opened"),
        ("zmq", refuse, "refused: this is pool"),
        ("zmq", nobody_listens, "closed the connection"),
    ],
)
async def test_kv_that_cannot_be_reached_is_left_behind(
    transport: str, break_it: Callable[[Instance], None], why: str
) -> None:
    async with local_cluster(config(transport)) as cluster:
        cluster.manager.set_draining("i1", True)
        await asyncio.sleep(0.05)
        streams = [
            asyncio.create_task(stream(cluster.frontend, f"r{n}", tokens=TOKENS, prompt=20 + n, seed=n))
            for n in range(REQUESTS)
        ]
        await asyncio.sleep(0.2)
        break_it(cluster.instances["i0"])
        cluster.manager.set_draining("i1", False)
        arrived = await move_swapped(cluster)
        assert await asyncio.gather(*streams) == [
            expected(tokens=TOKENS, prompt=20 + n, seed=n) for n in range(REQUESTS)
        ]
        events = [event for event in cluster.manager.events_after(0, 1000) if why in event.text]
        await cluster.idle()
    assert "without its KV (kv_not_readable" in arrived.reason and why in arrived.reason
    assert events, "the event log does not say why"
