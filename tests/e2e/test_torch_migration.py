"""A real model on two instances: what a moved request says is what it would have said."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from local_cluster import LocalCluster, local_cluster, simulated_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from llumnix.api.backend import StreamCall
from llumnix.core.admin import MigrationResult
from llumnix.core.config import Config, EngineConfig
from llumnix.core.messages.control import MigrationOutcome
from llumnix.core.sampling import SamplingParams
from llumnix.instance.model_loader import resolve_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

NEW_TOKENS = 48
TEXT = "The river ran past the old mill and nobody in the village could say why it had "


def real_config(dtype: str, transport: str) -> Config:
    engine = EngineConfig(
        model="smollm2", device="cpu", dtype=dtype, kv_blocks=120, step_tokens_max=96, threads=1, block_size=8
    )
    return replace(simulated_config(transport=transport), engine=engine)


async def generate(
    cluster: LocalCluster, prompts: Sequence[Sequence[int]], *, moving: bool, name: str, temperature: float
) -> tuple[list[tuple[int, ...]], int]:
    """All prompts at once; with ``moving``, running requests are sent to the other instance again and again.
    Returns outputs and committed migrations."""

    async def one(number: int) -> tuple[int, ...]:
        sampling = SamplingParams(
            max_tokens=NEW_TOKENS, seed=number, temperature=temperature, top_p=0.95, ignore_eos=True
        )
        stream = cluster.frontend.open(StreamCall(f"{name}{number}", tuple(prompts[number]), sampling))
        return tuple([token async for chunk in stream for token in chunk.tokens])

    outputs = asyncio.gather(*(one(number) for number in range(len(prompts))))
    committed = 0
    while moving and not outputs.done():
        rows = [row for row in await cluster.manager.requests() if row.output_tokens > 0]
        results = await asyncio.gather(
            *(
                cluster.manager.migrate(row.request_id, "i1" if row.instance_id == "i0" else "i0")
                for row in rows[:4]
            )
        )
        moved = [result for result in results if isinstance(result, MigrationResult)]
        committed += sum(result.outcome is MigrationOutcome.COMMITTED for result in moved)
        await asyncio.sleep(0.02)
    return await outputs, committed


def twenty_prompts(tokenizer: Any) -> list[list[int]]:
    return [tokenizer((TEXT * 6)[: 12 + 20 * n])["input_ids"] for n in range(20)]


@pytest.mark.asyncio
async def test_float32_greedy_tokens_equal_transformers_with_migrations_in_the_middle() -> None:
    folder = resolve_model("smollm2")
    prompts = twenty_prompts(AutoTokenizer.from_pretrained(folder))
    async with local_cluster(real_config("float32", "auto")) as cluster:
        outputs, committed = await generate(cluster, prompts, moving=True, name="g", temperature=0.0)
        await cluster.idle()
    assert committed >= 4
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        for prompt, output in zip(prompts, outputs, strict=True):
            scores = reference(torch.tensor([[*prompt, *output]])).logits[0]
            likeliest = scores[len(prompt) - 1 : -1].argmax(dim=-1)  # as greedy decoding would
            assert output == tuple(likeliest.tolist())


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", ["shm", "zmq"])
async def test_bfloat16_sampled_tokens_are_the_same_moved_or_not(transport: str) -> None:
    prompts = twenty_prompts(AutoTokenizer.from_pretrained(resolve_model("smollm2")))[:8]
    async with local_cluster(real_config("bfloat16", transport)) as cluster:
        still, _ = await generate(cluster, prompts, moving=False, name="still", temperature=0.9)
        moved, committed = await generate(cluster, prompts, moving=True, name="moved", temperature=0.9)
        await cluster.idle()
    assert moved == still
    assert committed >= 4
