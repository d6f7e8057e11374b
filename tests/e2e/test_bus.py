"""The bus, and the loops that run on it, when something is too much or goes wrong."""

import asyncio

import pytest
import zmq
from local_cluster import simulated_config

from llumnix.api.backend import FailKind, StreamCall, StreamFailed
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import Fenced, HelloWanted
from llumnix.core.sampling import SamplingParams
from llumnix.runtime import bus as bus_module
from llumnix.runtime.bus import Bus
from llumnix.runtime.frontend import Frontend
from llumnix.runtime.manager_server import ManagerServer

pytestmark = pytest.mark.e2e

WAIT_S = 20.0
CALL = StreamCall("r", (1, 2, 3), SamplingParams(max_tokens=4, seed=0))


def ignore(message: object) -> None:
    """Nobody is to hear anything here."""


async def until(condition: object) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_a_bus_has_many_peers_at_once() -> None:
    """A thousand instances are allowed, each a peer of the manager. Each peer here is one socket by
    another of this host's names."""
    context = zmq.Context()
    listener = context.socket(zmq.PULL)
    port = listener.bind_to_random_port("tcp://0.0.0.0")
    bus, heard = Bus("127.0.0.1", on_message=ignore, on_lost=ignore), 0
    peers = [f"tcp://127.1.{number // 250}.{1 + number % 250}:{port}" for number in range(600)]
    try:
        assert all(bus.send(peer, HelloWanted()) for peer in peers)
        async with asyncio.timeout(WAIT_S):
            while heard < len(peers):
                try:
                    listener.recv(zmq.NOBLOCK)
                    heard += 1
                except zmq.Again:
                    await asyncio.sleep(0.01)
    finally:
        bus.close()
        context.destroy(linger=0)


@pytest.mark.asyncio
async def test_a_bus_that_may_open_no_more_connections_drops_messages_and_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bus_module, "PEERS_MAX", 29)
    monkeypatch.setattr(bus_module, "PEER_SOCKETS", 1)
    heard: list[object] = []
    bus = Bus("127.0.0.1", on_message=heard.append, on_lost=ignore)
    try:
        sent = [bus.send(f"tcp://127.0.0.{number}:9", HelloWanted()) for number in range(1, 30)]
        assert sent.count(False) == bus.dropped > 0
        await asyncio.sleep(0.5)  # those given up take a moment to be gone
        await until(lambda: bus.send(bus.address, HelloWanted()))
        await until(lambda: heard)
    finally:
        bus.close()


@pytest.mark.asyncio
async def test_a_message_that_breaks_its_reader_does_not_hold_up_those_behind_it() -> None:
    heard: list[object] = []

    def broken(message: object) -> None:
        heard.append(message)
        if isinstance(message, Fenced):
            raise RuntimeError("out of luck")

    faults: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
    reader, writer = (Bus("127.0.0.1", on_message=one, on_lost=ignore) for one in (broken, ignore))
    try:
        for message in (Fenced("i0", "a"), HelloWanted(), HelloWanted()):
            writer.send(reader.address, message)
        await until(lambda: len(heard) == 3)
        assert len(faults) == 1
    finally:
        reader.close()
        writer.close()


@pytest.mark.asyncio
async def test_a_request_opened_twice_is_refused_and_the_first_goes_on() -> None:
    frontend = Frontend(simulated_config(), frontend_id="f", manager_address="tcp://127.0.0.1:9")
    try:
        first = frontend.open(CALL)
        with pytest.raises(InvariantError, match="open already"):
            frontend.open(CALL)
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(StreamFailed) as caught:
                async for _ in first:
                    pass
        assert caught.value.kind is FailKind.OVERLOADED
    finally:
        await frontend.close()


@pytest.mark.asyncio
async def test_a_manager_or_frontend_whose_ticks_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their processes end then, and are started again, instead of living on without rounds and deadlines."""
    failures: list[BaseException] = []
    manager = ManagerServer(
        simulated_config(),
        incarnation="m",
        port=0,
        on_hello=ignore,
        on_lost=ignore,
        on_failure=failures.append,
    )
    frontend = Frontend(
        simulated_config(), frontend_id="f", manager_address=manager.address, on_failure=failures.append
    )
    error = InvariantError("lost count")

    def fail(now: float) -> None:
        raise error

    try:
        monkeypatch.setattr(manager.core, "tick", fail)
        monkeypatch.setattr(frontend.table, "tick", fail)
        await until(lambda: failures == [error, error])
        assert frontend.failure is error
    finally:
        await frontend.close()
        await manager.close()
