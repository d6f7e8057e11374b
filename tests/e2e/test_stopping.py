"""The end of a cluster: its instances are Ray actors that outlive whoever started them, so none may be
forgotten. Ray itself is stood in for; tests/e2e/test_ray_cluster.py has the real one."""

import threading
from typing import Any

import pytest
from local_cluster import simulated_config

from llumnix.runtime import fleet as fleet_module
from llumnix.runtime import launch
from llumnix.runtime.fleet import Fleet

pytestmark = pytest.mark.e2e


@pytest.mark.asyncio
async def test_instances_are_stopped_at_once_so_that_one_that_hangs_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    present, stopped = [f"i{number}" for number in range(4)], []
    together = threading.Barrier(len(present))

    def stop(instance_id: str) -> None:
        together.wait(timeout=10)
        stopped.append(instance_id)

    monkeypatch.setattr(fleet_module, "instance_ids", lambda: present)
    monkeypatch.setattr(fleet_module, "reserved_ids", list)
    monkeypatch.setattr(fleet_module, "stop_instance", stop)
    fleet = Fleet(simulated_config(), 0, on_failure=lambda error: None)
    await fleet.stop()
    assert sorted(stopped) == present


class StuckManager:
    """Does not get to stopping anything in time."""

    class stop:
        @staticmethod
        def remote() -> str:
            return "pending"


def test_what_the_manager_did_not_stop_is_stopped_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(launch.ray, "wait", lambda calls, timeout: ([], calls))
    monkeypatch.setattr(launch.ray, "kill", done.append)
    monkeypatch.setattr(launch, "instance_ids", lambda: ["i0", "i7"])
    monkeypatch.setattr(launch, "stop_instance", lambda name, orderly: done.append((name, orderly)))
    manager: Any = StuckManager()
    launch.stop_cluster(manager)
    assert done == [manager, ("i0", False), ("i7", False)]
