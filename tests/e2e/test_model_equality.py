"""The torch executor against transformers: the same greedy tokens in float32, whatever the batch and the chunks.

Each architecture is a tiny random model saved by transformers itself, so reading its files is tested on the way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from llumnix.core.config import EngineConfig
from llumnix.core.sampling import SamplingParams
from llumnix.instance.executor import Chunk, StepPlan
from llumnix.instance.model_loader import resolve_model
from llumnix.instance.request import Request
from llumnix.instance.torch_executor import TorchExecutor

BLOCK_SIZE = 4
NEW_TOKENS = 12
PROMPT_LENS = (1, 3, 4, 5, 17, 40)

TINY = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # far from uniform scores, so that a mistake changes tokens
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MODELS = {
    "llama-tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama-llama3-rope": LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE),
    "llama-linear-rope-bias": LlamaConfig(**TINY, rope_parameters=LINEAR_ROPE, attention_bias=True),
    "mistral-head-dim": MistralConfig(**TINY, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
}


@dataclass(frozen=True)
class Pair:
    """One model twice: in transformers and in our executor."""

    reference: Any
    executor: TorchExecutor

    def expected(self, prompt: Sequence[int], new_tokens: int = NEW_TOKENS) -> list[int]:
        """Greedy continuation by transformers."""
        ids = torch.tensor([prompt])
        out = self.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
        return [int(token) for token in out[0, len(prompt) :]]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    config = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(7)
    reference = type(AutoModelForCausalLM.from_config(config))(config).eval()
    _randomize_vectors(reference)
    reference.save_pretrained(folder, max_shard_size="60KB" if request.param == "qwen3" else "1GB")
    executor = TorchExecutor(engine_config(folder), "equality")
    yield Pair(reference, executor)
    executor.close()


def _randomize_vectors(model: Any) -> None:
    """Norms start as ones and biases as zeros; a decoder that forgot them would pass."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def engine_config(folder: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(
        **{
            "model": str(folder),
            "device": "cpu",
            "dtype": "float32",
            "block_size": BLOCK_SIZE,
            "kv_blocks": 100,
        }
        | settings
    )


def prompt_of(length: int, vocab: int = 160) -> list[int]:
    return [(7 * length + 31 * index + index * index) % vocab for index in range(length)]


class Driver:
    """The smallest engine: gives each request blocks, prefills in chunks, decodes all together."""

    def __init__(self, executor: TorchExecutor) -> None:
        self._executor = executor
        # Highest first and every second one: block tables that a confusion of block and position would break.
        blocks = executor.kv_layout.blocks
        self._free = [*range(0, blocks, 2), *range(1, blocks, 2)]

    def add(self, prompt: Sequence[int], max_tokens: int = NEW_TOKENS) -> Request:
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0)
        size = self._executor.kv_layout.block_size
        blocks = [self._free.pop() for _ in range(-(-(len(prompt) + max_tokens) // size))]
        return Request("r", 0, "", sampling, 0, 0, "", 0.0, list(prompt), len(prompt), blocks=blocks)

    def step(self, requests: Sequence[Request], chunk_max: int) -> None:
        """One step of every request: its next chunk."""
        chunks = []
        for request in requests:
            start = request.computed_tokens
            count = min(chunk_max, len(request.tokens) - start)
            chunks.append(Chunk(request, start, count, start + count == len(request.tokens)))
        chunks.sort(key=lambda chunk: not chunk.request.prefilled)
        sampled = iter(self._executor.execute(StepPlan(tuple(chunks))))
        for chunk in chunks:
            chunk.request.computed_tokens += chunk.count
            if chunk.samples:
                chunk.request.tokens.append(next(sampled).token)

    def run(self, requests: Sequence[Request], chunk_max: int = 1000) -> list[list[int]]:
        while alive := [request for request in requests if request.output_len < request.sampling.max_tokens]:
            self.step(alive, chunk_max)
        for request in requests:
            self._free += request.blocks
        return [request.tokens[request.prompt_len :] for request in requests]


def test_alone(pair: Pair) -> None:
    driver = Driver(pair.executor)
    for length in PROMPT_LENS:
        prompt = prompt_of(length)
        assert driver.run([driver.add(prompt)]) == [pair.expected(prompt)]


@pytest.mark.parametrize("chunk_max", [1, 3, 8, 1000])
def test_batched_and_chunked(pair: Pair, chunk_max: int) -> None:
    driver = Driver(pair.executor)
    prompts = [prompt_of(length) for length in PROMPT_LENS]
    assert driver.run([driver.add(prompt) for prompt in prompts], chunk_max) == [
        pair.expected(prompt) for prompt in prompts
    ]
