"""The policy of examples/custom_policy.py: its decisions, and a cluster that is served by it. The Ray example
runs in test_ray_cluster.py."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from local_cluster import expected, local_cluster, simulated_config

from llumnix.api.backend import StreamCall
from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceRole, InstanceState
from llumnix.core.sampling import SamplingParams
from llumnix.core.views import DispatchPolicy, InstanceView, RequestView
from llumnix.policies.registry import dispatch_policy
from llumnix.runtime.frontend import Frontend

EXAMPLES = Path(__file__).parents[2] / "examples"
NAME = "custom_policy:TenantAffinity"

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PYTHONPATH=examples makes it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "custom_policy", raising=False)


def policy() -> DispatchPolicy:
    return dispatch_policy(SchedulerConfig(dispatch_policy=NAME))


def view(instance_id: str, used_blocks: int = 0) -> InstanceView:
    """An instance of 100 blocks."""
    return InstanceView(
        instance_id=instance_id,
        role=InstanceRole.NEUTRAL,
        state=InstanceState.SERVING,
        capacity_blocks=100,
        used_blocks=used_blocks,
        head_blocks=0,
        waiting_blocks=0,
        running=0,
        waiting=0,
        execution_priorities=(),
        candidates=(),
        placed_blocks=0,
        placed_requests=0,
        arriving_blocks=0,
        leaving_blocks=0,
        migrating_in=0,
        migrating_out=0,
        step_s=0.02,
        reported_at=0.0,
        freeness=float(100 - used_blocks),
        queue_freeness=float(100 - used_blocks),
    )


def request(tenant: str, blocks: int = 4) -> RequestView:
    return RequestView("r", blocks, 16 * blocks - 1, 64, 0, 0, tenant)


def test_a_tenant_keeps_its_instance_whatever_the_order_of_candidates() -> None:
    views = tuple(view(f"i{number}") for number in range(4))
    first = {tenant: policy().place(request(tenant), views).instance_id for tenant in "abcdefghij"}
    again = {tenant: policy().place(request(tenant), views[::-1]).instance_id for tenant in first}
    assert first == again
    assert len(set(first.values())) == 4, "tenants spread"


def test_a_full_instance_is_passed_over_and_comers_move_few_tenants() -> None:
    views = tuple(view(f"i{number}") for number in range(4))
    chosen = policy().place(request("a"), views).instance_id
    full = tuple(one._replace(used_blocks=98) if one.instance_id == chosen else one for one in views)
    assert policy().place(request("a"), full).instance_id not in (None, chosen)
    tenants = [f"tenant-{number}" for number in range(100)]
    before = [policy().place(request(tenant), views).instance_id for tenant in tenants]
    after = [policy().place(request(tenant), (*views, view("i4"))).instance_id for tenant in tenants]
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"i4"}
    assert len(moved) < 50


def test_without_a_tenant_or_room_the_freest_is_taken() -> None:
    views = (view("i1", used_blocks=50), view("i0", used_blocks=97))
    assert policy().place(request(""), views).instance_id == "i1"
    assert policy().place(request("a", blocks=60), views).instance_id == "i1"


@pytest.mark.asyncio
async def test_a_cluster_is_served_by_it() -> None:
    config = simulated_config()
    config = replace(config, scheduler=replace(config.scheduler, dispatch_policy=NAME))
    async with local_cluster(config) as cluster:
        tenants = [f"tenant-{number % 4}" for number in range(12)]
        streams = [
            asyncio.create_task(_run(cluster.frontend, f"r{number}", tenant))
            for number, tenant in enumerate(tenants)
        ]
        rows = []
        async with asyncio.timeout(10):
            while len(rows) < len(tenants):
                rows = list(await cluster.manager.requests())
        homes = {tenant: {row.instance_id for row in rows if row.tenant == tenant} for tenant in tenants}
        assert all(len(instances) == 1 for instances in homes.values()), homes
        assert await asyncio.gather(*streams) == [expected(tokens=120)] * len(tenants)


async def _run(frontend: Frontend, request_id: str, tenant: str) -> tuple[int, ...]:
    sampling = SamplingParams(max_tokens=120, seed=1)
    call = StreamCall(request_id, tuple(range(1, 41)), sampling, tenant=tenant)
    return tuple([token async for chunk in frontend.open(call) for token in chunk.tokens])
