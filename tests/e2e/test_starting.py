"""An instance whose process starts and is never heard of, as behind a firewall. Ray is stood in for."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import pytest
import pytest_asyncio
from local_cluster import simulated_config

from llumnix.core.admin import ClusterSummary, Refusal
from llumnix.core.messages.control import InstanceHello, InstanceRole, KvEndpoint, KvLayout
from llumnix.runtime import fleet as fleet_module
from llumnix.runtime.actors import ProcessName
from llumnix.runtime.fleet import Fleet

pytestmark = pytest.mark.e2e

HELLO = InstanceHello(
    *("i0", "earlier", "tcp://127.0.0.1:9", InstanceRole.NEUTRAL, "simulated", 512),
    KvLayout(100, 2, 2, 16, 8, "float32"),
    KvEndpoint("elsewhere", 1, -1, "pool", "tcp://127.0.0.1:9"),
)


class Started:
    """An actor whose constructor is through. ``remote`` starts it, or calls it."""

    def __getattr__(self, name: str) -> Any:
        return self

    def options(self, **options: object) -> "Started":
        return self

    def remote(self, *arguments: object) -> "Started":
        return self

    def future(self) -> "Future[ProcessName]":
        through: Future[ProcessName] = Future()
        through.set_result(ProcessName("new", 1))
        return through


def not_there(instance_id: str) -> Any:
    raise ValueError(instance_id)


@pytest_asyncio.fixture
async def stopped() -> list[tuple[str, bool]]:
    """Every instance that was stopped, and whether in order."""
    return []


@pytest_asyncio.fixture
async def fleet(monkeypatch: pytest.MonkeyPatch, stopped: list[tuple[str, bool]]) -> AsyncIterator[Fleet]:
    """A fleet that has started nothing yet and waits for nobody long."""
    stood_in: dict[str, Any] = {
        "instance_ids": list,
        "reserved_ids": list,
        "actor_options": lambda engine, instance_id: {},
        "RemoteInstance": Started(),
        "find_instance": not_there,
        "stop_instance": lambda instance_id, orderly=True: stopped.append((instance_id, orderly)),
        "HELLO_TIMEOUT_S": 0.3,
        "RECOVERY_S": 0.0,
    }
    for name, value in stood_in.items():
        monkeypatch.setattr(fleet_module, name, value)
    made = Fleet(simulated_config(), 0, on_failure=lambda error: None)
    yield made
    await made.stop()


@pytest.mark.asyncio
async def test_an_instance_that_is_never_heard_of_is_given_up_with_a_line(
    fleet: Fleet, stopped: list[tuple[str, bool]]
) -> None:
    for _ in range(2):  # the lock is free again
        outcome = await fleet.scale(1)
        assert isinstance(outcome, Refusal)
        assert "i0 did not start: its process runs, but the manager has not heard from it" in outcome.reason
        assert fleet.server.address in outcome.reason
    assert stopped == [("i0", False), ("i0", False)], "nothing of it is left"
    assert [event.kind for event in fleet.server.events_after(0, 10)][-1] == "start_failed"


@pytest.mark.asyncio
async def test_the_hello_of_an_earlier_process_of_that_id_does_not_count(fleet: Fleet) -> None:
    fleet.server._handle(HELLO)
    assert isinstance(await fleet.scale(1), Refusal)


@pytest.mark.asyncio
async def test_an_instance_that_says_hello_is_there(fleet: Fleet) -> None:
    asyncio.get_running_loop().call_later(0.1, fleet.server._handle, HELLO)
    assert isinstance(await fleet.scale(1), ClusterSummary)
