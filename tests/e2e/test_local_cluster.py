"""Serving and moving requests on a whole cluster in one process: real bus, real transports, KV that is
checked."""

import asyncio
import socket
import time
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import zmq
from local_cluster import LocalCluster, expected, local_cluster, simulated_config, stream

from llumnix.api.backend import FailKind, StreamCall, StreamFailed
from llumnix.core.admin import MigrationResult, Refusal
from llumnix.core.epochs import epoch_at
from llumnix.core.messages.control import Fenced, KvEndpoint
from llumnix.core.sampling import SamplingParams
from llumnix.migration.transports.base import BlockReader, ReadStats
from llumnix.runtime.bus import Bus
from llumnix.runtime.frontend import Frontend
from llumnix.runtime.instance_server import InstanceServer
from llumnix.runtime.manager_server import ManagerServer
from llumnix.runtime.open_readers import OpenReaders

pytestmark = pytest.mark.e2e


def other(instance_id: str) -> str:
    return "i1" if instance_id == "i0" else "i0"


async def move_about(cluster: LocalCluster, moves: int) -> int:
    """Order moves of whatever runs, back and forth; returns how many were committed."""
    committed = 0
    for _ in range(moves):
        rows = [row for row in await cluster.manager.requests() if row.output_tokens > 0]
        results = await asyncio.gather(
            *(cluster.manager.migrate(row.request_id, other(row.instance_id)) for row in rows[:3])
        )
        committed += sum(
            isinstance(result, MigrationResult) and result.outcome == "committed" for result in results
        )
    return committed


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", ["inprocess", "shm", "zmq"])
async def test_requests_move_back_and_forth_without_losing_or_doubling_a_token(transport: str) -> None:
    async with local_cluster(simulated_config(transport=transport)) as cluster:
        streams = [
            asyncio.create_task(stream(cluster.frontend, f"r{n}", tokens=150, prompt=20 + 9 * n, seed=n))
            for n in range(6)
        ]
        await asyncio.sleep(0.1)
        committed = await move_about(cluster, 4)
        outputs = await asyncio.gather(*streams)
        assert outputs == [expected(tokens=150, prompt=20 + 9 * n, seed=n) for n in range(6)]
        assert committed >= 4
        assert len(cluster.frontend.table.moves) == committed
        await cluster.idle()


class SlowAtTheEnd:
    """Readers of an instance, whose last blocks take a second each time."""

    def __init__(self, server: InstanceServer) -> None:
        self._readers = server._readers
        self.reading = False

    def get(self, endpoint: KvEndpoint) -> BlockReader:
        reader = self._readers.get(endpoint)
        return cast(BlockReader, SimpleNamespace(read=partial(self._read, reader), close=reader.close))

    def _read(self, reader: BlockReader, *blocks: Any, urgent: bool = False, rests: bool = True) -> ReadStats:
        self.reading = urgent
        time.sleep(1.0 if urgent else 0.0)
        self.reading = False
        return reader.read(*blocks, urgent=urgent, rests=rests)

    def close(self, pool_name: str) -> None:
        self._readers.close(pool_name)

    def close_all(self) -> None:
        self._readers.close_all()


@pytest.mark.asyncio
async def test_who_runs_at_a_target_does_not_wait_for_last_blocks_that_do_not_come() -> None:
    async with local_cluster(simulated_config(step_ms=10.0)) as cluster:
        streams = [asyncio.create_task(stream(cluster.frontend, f"r{n}", tokens=400)) for n in range(2)]
        await asyncio.sleep(0.3)
        rows = {row.instance_id: row for row in await cluster.manager.requests()}
        server = cluster.instances["i1"].server
        slow = SlowAtTheEnd(server)
        server._readers = cast(OpenReaders, slow)
        moving = asyncio.create_task(cluster.manager.migrate(rows["i0"].request_id, "i1"))
        async with asyncio.timeout(10):
            while not slow.reading:
                await asyncio.sleep(0.01)
        known = []
        for wait_s in (0.05, 0.4):
            await asyncio.sleep(wait_s)
            held = await cluster.manager.requests()
            known += [row.output_tokens for row in held if row.request_id == rows["i1"].request_id]
        assert known[1] - known[0] >= 5, "of some forty steps"
        assert isinstance(await moving, MigrationResult)
        assert await asyncio.gather(*streams) == 2 * [expected(tokens=400)]


@pytest.mark.asyncio
async def test_a_drained_instance_gives_everything_away_and_gets_nothing_new() -> None:
    async with local_cluster(simulated_config(pairing="freeness")) as cluster:
        streams = [
            asyncio.create_task(stream(cluster.frontend, f"r{n}", tokens=300, seed=n)) for n in range(6)
        ]
        await asyncio.sleep(0.2)
        assert not isinstance(cluster.manager.set_draining("i0", True), Refusal)
        late = asyncio.create_task(stream(cluster.frontend, "late", tokens=50, seed=9))
        async with asyncio.timeout(10):
            while any(row.instance_id == "i0" for row in await cluster.manager.requests()):
                await asyncio.sleep(0.05)
        assert not any(task.done() for task in streams), "they were moved, not waited for"
        assert await asyncio.gather(*streams) == [expected(tokens=300, seed=n) for n in range(6)]
        assert await late == expected(tokens=50, seed=9)
        assert cluster.row_state("i0") == "draining"


@pytest.mark.asyncio
async def test_the_scheduler_evens_out_load_by_itself() -> None:
    config = simulated_config(pairing="freeness", kv_blocks=64)
    async with local_cluster(config) as cluster:
        cluster.manager.set_draining("i1", True)
        await asyncio.sleep(0.1)
        streams = [
            asyncio.create_task(stream(cluster.frontend, f"r{n}", tokens=200, prompt=60, seed=n))
            for n in range(8)
        ]
        await asyncio.sleep(0.2)
        cluster.manager.set_draining("i1", False)
        outputs = await asyncio.gather(*streams)
        assert outputs == [expected(tokens=200, prompt=60, seed=n) for n in range(8)]
        assert cluster.manager.summary().migrations_committed >= 1
        await cluster.idle()


@pytest.mark.asyncio
async def test_a_client_that_goes_away_frees_its_blocks_wherever_its_request_is() -> None:
    async with local_cluster(simulated_config()) as cluster:
        tasks = [
            asyncio.create_task(stream(cluster.frontend, f"r{n}", tokens=2000, seed=n)) for n in range(4)
        ]
        await asyncio.sleep(0.2)
        for row in (await cluster.manager.requests())[:2]:
            await cluster.manager.migrate(row.request_id, other(row.instance_id))
        for n in range(4):
            cluster.frontend.cancel(f"r{n}")
        await cluster.idle()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.asyncio
async def test_requests_of_a_frontend_that_died_are_dropped() -> None:
    config = simulated_config()
    async with local_cluster(config) as cluster:
        doomed = Frontend(config, frontend_id="doomed", manager_address=cluster.manager.address)
        await asyncio.sleep(0.2)
        orphans = [asyncio.create_task(stream(doomed, f"o{n}", tokens=3000, seed=n)) for n in range(4)]
        living = asyncio.create_task(stream(cluster.frontend, "r", tokens=300))
        async with asyncio.timeout(10):
            while cluster.manager.summary().running < 5:
                await asyncio.sleep(0.02)
        doomed.bus.close()  # no goodbye, as after a SIGKILL
        assert await living == expected(tokens=300)
        await cluster.idle()
        for orphan in orphans:
            orphan.cancel()
        await asyncio.gather(*orphans, return_exceptions=True)
        await doomed.close()


@pytest.mark.asyncio
async def test_a_client_that_does_not_read_slows_nobody_and_misses_nothing() -> None:
    async with local_cluster(simulated_config()) as cluster:
        params = SamplingParams(max_tokens=200, seed=3)
        unread = cluster.frontend.open(StreamCall("slow", tuple(range(1, 41)), params))
        assert await stream(cluster.frontend, "fast", tokens=200, seed=4) == expected(tokens=200, seed=4)
        await cluster.idle()
        chunks = [chunk async for chunk in unread]
        assert len(chunks) == 1
        assert chunks[0].tokens == expected(tokens=200, seed=3)


@pytest.mark.asyncio
async def test_serving_goes_on_without_a_manager_and_a_new_one_learns_the_cluster_anew() -> None:
    config = simulated_config()
    async with local_cluster(config) as cluster:
        before = asyncio.create_task(stream(cluster.frontend, "before", tokens=1200, seed=1))
        await asyncio.sleep(0.2)
        port = int(cluster.manager.address.rpartition(":")[2])
        await cluster.manager.close()
        without = await stream(cluster.frontend, "without", tokens=20, seed=2)
        assert without == expected(tokens=20, seed=2)
        cluster.manager = ManagerServer(
            config, incarnation="m2", port=port, on_hello=lambda hello: None, on_lost=lambda address: None
        )
        async with asyncio.timeout(10):
            while cluster.manager.summary().serving < 2 or cluster.manager.summary().frontends < 1:
                await asyncio.sleep(0.02)
        rows = await cluster.manager.requests()
        result = await cluster.manager.migrate(rows[0].request_id, other(rows[0].instance_id))
        assert isinstance(result, MigrationResult), result
        assert await before == expected(tokens=1200, seed=1)
        assert await stream(cluster.frontend, "after", tokens=20, seed=5) == expected(tokens=20, seed=5)


@pytest.mark.asyncio
async def test_orders_that_make_no_sense_are_refused_with_the_reason() -> None:
    async with local_cluster(simulated_config()) as cluster:
        running = asyncio.create_task(stream(cluster.frontend, "r", tokens=200))
        await asyncio.sleep(0.2)
        row = (await cluster.manager.requests())[0]
        for request_id, target_id, why in (
            ("nobody", "i0", "nobody"),
            ("r", "i7", "i7"),
            ("r", row.instance_id, "already"),
        ):
            refusal = await cluster.manager.migrate(request_id, target_id)
            assert isinstance(refusal, Refusal)
            assert why in refusal.reason
        assert isinstance(cluster.manager.set_draining("i9", True), Refusal)
        cluster.manager.set_draining(other(row.instance_id), True)
        refusal = await cluster.manager.migrate("r", other(row.instance_id))
        assert isinstance(refusal, Refusal)
        assert "draining" in refusal.reason
        assert await running == expected(tokens=200)


@pytest.mark.asyncio
async def test_nonsense_on_the_bus_changes_nothing() -> None:
    async with local_cluster(simulated_config()) as cluster:
        running = asyncio.create_task(stream(cluster.frontend, "r", tokens=200))
        addresses = [cluster.manager.address, cluster.frontend.address]
        addresses += [instance.server.address for instance in cluster.instances.values()]
        context = zmq.Context()
        for address in addresses:
            with context.socket(zmq.PUSH) as push:
                push.connect(address)
                for junk in (b"", b"\xc1", b"\x93\x01\x02\x03", b"\x91\xcd\xff\xff", b"\x00" * 5000):
                    push.send(junk)
                push.setsockopt(zmq.LINGER, 500)
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            with socket.create_connection((host, int(port))) as raw:
                raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        context.term()
        assert await running == expected(tokens=200)


@pytest.mark.asyncio
async def test_a_message_for_an_address_that_is_none_is_lost_alone() -> None:
    heard: asyncio.Queue[object] = asyncio.Queue()
    bus = Bus("127.0.0.1", on_message=heard.put_nowait, on_lost=lambda address: None)
    try:
        for address in ("nowhere", "", "tcp://127.0.0.1"):
            assert not bus.send(address, Fenced("i", "p"))
        assert bus.send(bus.address, Fenced("i", "q"))
        async with asyncio.timeout(10):
            assert await heard.get() == Fenced("i", "q")
        assert bus.dropped == 3
    finally:
        bus.close()


@pytest.mark.asyncio
async def test_over_capacity_is_refused_with_a_time_to_come_back_and_harms_nobody() -> None:
    config = simulated_config(kv_blocks=32, waiting_max=4)
    async with local_cluster(config) as cluster:
        tasks = [
            asyncio.create_task(stream(cluster.frontend, f"r{n}", tokens=150, prompt=100)) for n in range(60)
        ]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        served = [result for result in results if isinstance(result, tuple)]
        refused = [result for result in results if isinstance(result, StreamFailed)]
        assert len(served) + len(refused) == 60
        assert served
        assert refused
        assert set(served) == {expected(tokens=150, prompt=100)}
        assert all(error.kind is FailKind.OVERLOADED and error.retry_after_s > 0 for error in refused)
        await cluster.idle()


@pytest.mark.asyncio
async def test_an_id_that_is_used_again_is_a_new_request() -> None:
    """Instances took the second one for the first said twice, and gave its client the first one's answer."""
    async with local_cluster(simulated_config()) as cluster:
        for run, epoch in enumerate((epoch_at(1_700_000_000_000), epoch_at(1_700_000_000_001))):
            got = await stream(cluster.frontend, "story", tokens=20, seed=run, first_epoch=epoch)
            assert got == expected(tokens=20, seed=run)
        await cluster.idle()


@pytest.mark.asyncio
async def test_cancelled_streams_end_at_once() -> None:
    async with local_cluster(simulated_config()) as cluster:
        call = StreamCall("r", (1, 2, 3), SamplingParams(max_tokens=1000, seed=1))
        reading = cluster.frontend.open(call)
        began = time.monotonic()
        with pytest.raises(StreamFailed):
            async for _ in reading:
                await reading.cancel()
        assert time.monotonic() - began < 20
