"""What the Python handle refuses before anything of it travels; test_ray_cluster.py has a whole one."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from local_cluster import LocalCluster, local_cluster, simulated_config

from llumnix.api.backend import ModelInfo
from llumnix.api.byte_tokenizer import ByteTokenizer
from llumnix.core.admin import DecisionRow, MigrationResult, Refusal
from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import RequestRow
from llumnix.instance.simulated_executor import EOS_TOKEN, VOCAB_SIZE
from llumnix.runtime.connect import Cluster
from llumnix.runtime.manager_actor import ClusterDescription
from llumnix.runtime.manager_server import ManagerServer

pytestmark = pytest.mark.e2e

NO_ADMIN: Any = None


@pytest_asyncio.fixture
async def handle() -> AsyncIterator[Cluster]:
    """A handle on a running cluster of one instance; orders need Ray, which is not there."""
    async with local_cluster(simulated_config(), ["i0"]) as cluster, made(cluster, NO_ADMIN) as one:
        yield one


def made(cluster: LocalCluster, admin: Any) -> Cluster:
    """One more handle on a cluster."""
    description = ClusterDescription(cluster.config, cluster.manager.address, 512)
    model = ModelInfo("simulated", 512, "", (EOS_TOKEN,), VOCAB_SIZE)
    return Cluster(description, admin, model, ByteTokenizer())


class DirectAdmin:
    """Asks the manager itself, where a handle would ask its actor."""

    def __init__(self, manager: ManagerServer) -> None:
        self._manager = manager

    async def requests(self) -> tuple[RequestRow, ...]:
        return await self._manager.requests()

    async def migrate(self, request_id: str, target_id: str) -> MigrationResult | Refusal:
        return await self._manager.migrate(request_id, target_id)

    async def explain(self, request_id: str) -> tuple[DecisionRow, ...] | Refusal:
        return self._manager.explain(request_id)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("prompt", "settings", "why"),
    [
        ("hi", {"max_tokens": 4.0}, "max_tokens: expected int, got float"),
        ("hi", {"priority": 1.5}, "priority: expected int, got float"),
        ("hi", {"priority": 10**30}, "cannot be sent"),
        ("hi", {"tenant": None}, "tenant: expected str"),
        ("hi", {"temperature": np.float32(0.5)}, "cannot be sent"),
        ((1, 10**30), {}, "token ids must be within 0 and"),
        ((1, -1), {}, "token ids must be within 0 and"),
        ("", {}, "may not be empty"),
        ("hi", {"max_tokens": 600}, "have room for 512"),
        ("hi", {"temperature": 3}, "temperature must be within 0 and 2"),
    ],
)
async def test_what_no_instance_would_take_is_refused_at_once(
    handle: Cluster, prompt: Any, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigurationError, match=why):
        await anext(handle.generate(prompt, **settings))


@pytest.mark.asyncio
async def test_whole_numbers_of_numpy_are_tokens(handle: Cluster) -> None:
    prompt: Any = np.array([104, 105])
    pieces = [piece async for piece in handle.generate(prompt, max_tokens=3, temperature=0, ignore_eos=True)]
    assert sum(len(piece.tokens) for piece in pieces) == 3


@pytest.mark.asyncio
async def test_an_id_in_use_is_refused_and_its_stream_goes_on(handle: Cluster) -> None:
    first = handle.generate("hi", max_tokens=40, request_id="mine", ignore_eos=True)
    begun = await anext(first)
    with pytest.raises(ConfigurationError, match="'mine' is being generated already"):
        await anext(handle.generate("ho", request_id="mine"))
    assert len(begun.tokens) + sum([len(piece.tokens) async for piece in first]) == 40


@pytest.mark.asyncio
@pytest.mark.parametrize("instances", [["i0"], ["i0", "i1"]])
async def test_two_handles_that_choose_the_same_id_are_kept_apart(instances: list[str]) -> None:
    async with local_cluster(simulated_config(), instances) as cluster:
        admin = DirectAdmin(cluster.manager)
        async with made(cluster, admin) as ours, made(cluster, admin) as theirs:

            async def tokens(handle: Cluster, seed: int) -> list[int]:
                settings: dict[str, Any] = {"seed": seed, "max_tokens": 200, "ignore_eos": True}
                pieces = handle.generate("hi", request_id="mine", **settings)
                return [token async for piece in pieces for token in piece.tokens]

            alone = [await tokens(ours, 1), await tokens(theirs, 2)]
            running = [asyncio.create_task(tokens(ours, 1)), asyncio.create_task(tokens(theirs, 2))]
            async with asyncio.timeout(10):
                while len(await cluster.manager.requests()) < 2:
                    await asyncio.sleep(0.01)
            names = {row.request_id: row.instance_id for row in await ours.requests()}
            assert "mine" in names, names
            if len(instances) > 1:
                target = "i1" if names["mine"] == "i0" else "i0"
                moved = await ours.migrate("mine", target)
                assert isinstance(moved, MigrationResult) and moved.outcome == "committed", moved
                assert {row.request_id: row.instance_id for row in await ours.requests()}["mine"] == target
                refused = await cluster.manager.migrate("mine", target)
                assert isinstance(refused, Refusal) and "several requests are called mine" in refused.reason
            assert isinstance(await ours.explain("mine"), tuple)
            assert await asyncio.gather(*running) == alone
            for handle in (ours, theirs):
                assert handle._frontend.table.stats.continued == 0, "neither was pushed out"
