"""What the Python handle refuses before anything of it travels; test_ray_cluster.py has a whole one."""

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from local_cluster import local_cluster, simulated_config

from llumnix.api.backend import ModelInfo
from llumnix.api.byte_tokenizer import ByteTokenizer
from llumnix.core.errors import ConfigurationError
from llumnix.instance.simulated_executor import EOS_TOKEN, VOCAB_SIZE
from llumnix.runtime.connect import Cluster
from llumnix.runtime.manager_actor import ClusterDescription

pytestmark = pytest.mark.e2e

NO_ADMIN: Any = None


@pytest_asyncio.fixture
async def handle() -> AsyncIterator[Cluster]:
    """A handle on a running cluster of one instance; orders need Ray, which is not there."""
    async with local_cluster(simulated_config(), ["i0"]) as cluster:
        description = ClusterDescription(cluster.config, cluster.manager.address, 512)
        model = ModelInfo("simulated", 512, "", (EOS_TOKEN,), VOCAB_SIZE)
        async with Cluster(description, NO_ADMIN, model, ByteTokenizer()) as made:
            yield made


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
