"""What lives in an event loop on a thread of its own must not go deaf without a word."""

import asyncio
import queue
import threading

import pytest
from local_cluster import local_cluster, simulated_config

from llumnix.core.errors import InvariantError
from llumnix.runtime.loop_thread import LoopThread

pytestmark = pytest.mark.e2e

WAIT_S = 10.0


async def leave(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_ends_the_loop_is_told(error: BaseException) -> None:
    failures: queue.Queue[BaseException] = queue.Queue()
    thread = LoopThread("loop", failures.put)
    asyncio.run_coroutine_threadsafe(leave(error), thread.loop)
    assert failures.get(timeout=WAIT_S) is error
    thread.stop()


def test_a_loop_that_somebody_stops_is_told_and_an_ordered_end_is_not() -> None:
    failures: queue.Queue[BaseException] = queue.Queue()
    stopped = LoopThread("loop", failures.put)
    stopped.loop.call_soon_threadsafe(stopped.loop.stop)
    assert isinstance(failures.get(timeout=WAIT_S), InvariantError)
    stopped.stop()
    thread = LoopThread("loop", failures.put)
    assert thread.run(asyncio.sleep(0, "done")) == "done"
    thread.stop()
    assert failures.empty()


@pytest.mark.asyncio
async def test_an_engine_thread_that_is_told_to_exit_fails_its_instance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_cluster(simulated_config(), ["i0"]) as cluster:
        server = cluster.instances["i0"].server
        failed = threading.Event()
        monkeypatch.setattr(server, "_on_failure", lambda error: failed.set())

        def tick(now: float) -> list[object]:
            raise SystemExit(3)

        monkeypatch.setattr(server._agent, "tick", tick)
        assert await asyncio.to_thread(failed.wait, WAIT_S)
