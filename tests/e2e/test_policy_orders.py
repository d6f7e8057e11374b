"""Policies changed and requests explained on a running cluster, and the commands for it."""

import asyncio
import json
from collections.abc import Iterator

import pytest
from local_backend import Served, served
from local_cluster import WAIT_S, expected, local_cluster, simulated_config, stream

from llumnix.cli.main import main
from llumnix.core.admin import PolicyState, Refusal
from llumnix.core.config import EngineConfig, FrontendConfig
from llumnix.runtime.manager_server import ManagerServer

pytestmark = pytest.mark.e2e


@pytest.mark.asyncio
async def test_a_request_leaves_before_its_instance_runs_out_of_blocks() -> None:
    async with local_cluster(simulated_config(kv_blocks=24, step_ms=10.0, pairing="drain")) as cluster:
        cluster.manager.set_draining("i1", True)
        streams = [
            asyncio.create_task(stream(cluster.frontend, f"r{n}", tokens=160, seed=n)) for n in range(2)
        ]
        async with asyncio.timeout(10):
            while sum(row.running for row in cluster.manager.instances()) < 2:
                await asyncio.sleep(0.01)
        cluster.manager.set_draining("i1", False)
        assert [await one for one in streams] == [expected(tokens=160, seed=n) for n in range(2)]
        told = [cluster.manager.explain(f"r{n}") for n in range(2)]
        moved = [
            row for rows in told if not isinstance(rows, Refusal) for row in rows if row.kind != "placed"
        ]
        assert [(row.kind, row.policy) for row in moved if row.kind != "stays"] == [
            ("move ordered", "cheapest"),
            ("move committed", ""),
        ]
        assert any(row.reason.startswith("blocks of i0 last") for row in moved)
        await cluster.idle()
        assert sum(row.preemptions_total for row in cluster.manager.instances()) == 0


@pytest.mark.asyncio
async def test_a_change_reaches_the_instances_and_outlives_the_manager() -> None:
    async with local_cluster(simulated_config()) as cluster:
        changed = cluster.manager.set_policy("selection", "longest", {"rest_s": "0.5"})
        assert isinstance(changed, PolicyState) and changed.policies["selection"] == "longest"
        assert isinstance(cluster.manager.set_policy("selection", "none", {}), Refusal)
        assert await stream(cluster.frontend, "r1") == expected()
        explained = cluster.manager.explain("r1")
        assert not isinstance(explained, Refusal)
        assert explained[0].kind == "placed" and explained[0].instance_id in ("i0", "i1")
        port = int(cluster.manager.address.rpartition(":")[2])
        await cluster.manager.close()
        cluster.manager = ManagerServer(
            cluster.config, incarnation="m2", port=port, on_hello=lambda hello: None, on_lost=lambda at: None
        )
        assert cluster.manager.policies().revision == 0
        async with asyncio.timeout(WAIT_S):
            while cluster.manager.policies().revision != 1:
                await asyncio.sleep(0.02)
        assert cluster.manager.policies() == changed


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    engine = EngineConfig(kind="simulated", simulated_step_ms=1, max_model_len=512, kv_blocks=64)
    with served(engine, FrontendConfig(port=0)) as running:
        monkeypatch.setenv("LLUMNIX_URL", running.url)
        yield running


def test_commands(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        return (main(arguments), *capsys.readouterr())

    status, out, _ = run("policy", "show")
    assert status == 0 and "dispatch" in out and "load" in out and "rest_s" in out
    status, out, _ = run("policy", "set", "dispatch", "load", "--setting", "rest_s=1", "--json")
    assert status == 0 and json.loads(out)["policies"] == {"dispatch": "freeness"}
    assert server.backend.admin.orders == [("policy", "dispatch", "load", "rest_s", "1")]
    assert run("policy", "set", "dispatch", "best") == (1, "", "llumnix: best unknown\n")
    assert run("policy", "set", "dispatch", "load", "--setting", "rest_s")[0] == 1
    status, out, _ = run("explain", "r1")
    assert status == 0 and "freest" in out and "instance-0 8" in out and "move committed" in out
    assert json.loads(run("explain", "r1", "--json")[1])[0]["scores"] == [["instance-0", 8.0]]
    assert run("explain", "r2") == (1, "", "llumnix: nothing is known of r2\n")
