"""Prefill and decode on instances of their own: real engines, a request that passes from one to the other,
and tokens that do not tell."""

import asyncio
from dataclasses import replace

import pytest
from local_cluster import LocalCluster, expected, local_cluster, simulated_config, stream
from test_torch_migration import generate, real_config, twenty_prompts
from transformers import AutoTokenizer

from llumnix.core.admin import Refusal
from llumnix.core.config import Config
from llumnix.core.messages.control import InstanceRole
from llumnix.instance.model_loader import resolve_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def apart(config: Config) -> Config:
    """The same, its first instance to prefill, its second to decode."""
    cluster = replace(config.cluster, prefill_instances=1, decode_instances=1)
    return replace(config, cluster=cluster)


def whereabouts(cluster: LocalCluster, request_id: str) -> list[tuple[str, str]]:
    rows = cluster.manager.explain(request_id)
    assert not isinstance(rows, Refusal)
    return [(row.kind, row.instance_id) for row in rows]


@pytest.mark.asyncio
async def test_a_real_model_prefills_here_and_decodes_there_with_the_same_tokens() -> None:
    prompts = twenty_prompts(AutoTokenizer.from_pretrained(resolve_model("smollm2")))[:5]
    config = real_config("bfloat16", "auto")
    async with local_cluster(config) as cluster:
        together, _ = await generate(cluster, prompts, moving=False, name="n", temperature=0.9)
    async with local_cluster(apart(config)) as cluster:
        assert [row.role for row in cluster.manager.instances()] == [
            InstanceRole.PREFILL,
            InstanceRole.DECODE,
        ]
        split, _ = await generate(cluster, prompts, moving=False, name="n", temperature=0.9)
        for number in range(len(prompts)):
            kinds = whereabouts(cluster, f"n{number}")
            assert kinds[0] == ("placed", "i0") and ("move committed", "i1") in kinds
        await cluster.idle()
    assert split == together


@pytest.mark.asyncio
async def test_roles_change_while_requests_run() -> None:
    async with local_cluster(simulated_config(step_ms=10.0)) as cluster:
        streams = [asyncio.create_task(stream(cluster.frontend, f"r{n}", seed=n)) for n in range(6)]
        await asyncio.sleep(0.3)
        for instance_id, role in (("i0", InstanceRole.PREFILL), ("i1", InstanceRole.DECODE)):
            assert not isinstance(cluster.manager.set_role(instance_id, role), Refusal)
        async with asyncio.timeout(20):
            while any(row.instance_id == "i0" for row in await cluster.manager.requests()):
                await asyncio.sleep(0.02)
        assert [await one for one in streams] == [expected(seed=n) for n in range(6)]
        await stream(cluster.frontend, "new", tokens=40)
        assert whereabouts(cluster, "new")[0] == ("placed", "i0")
        await cluster.idle()
