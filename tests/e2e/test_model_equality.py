"""The torch executor against transformers: the same greedy tokens in float32, whatever the batch and the
chunks.

Each architecture is a tiny random model saved by transformers itself, so reading its files is tested on the
way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llumnix.core.config import EngineConfig, SchedulerConfig, SwapConfig
from llumnix.core.messages.serving import RequestSpec
from llumnix.core.sampling import SamplingParams
from llumnix.instance.executor import Chunk, StepPlan
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.model_loader import resolve_model
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.request import Request
from llumnix.instance.torch_executor import TorchExecutor

BLOCK_SIZE = 4
NEW_TOKENS = 12
PROMPT_LENS = (1, 3, 4, 5, 17, 40)

TINY: dict[str, Any] = {
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
LLAMA3_ROPE: Any = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE: Any = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# Model class and configuration; transformers has no types for them.
MODELS: dict[str, tuple[Any, Any]] = {
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**TINY, tie_word_embeddings=True)),
    "llama-llama3-rope": (LlamaForCausalLM, LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE)),
    "llama-linear-rope-bias": (
        LlamaForCausalLM,
        LlamaConfig(**TINY, rope_parameters=LINEAR_ROPE, attention_bias=True),
    ),
    "mistral-head-dim": (MistralForCausalLM, MistralConfig(**TINY, head_dim=16, sliding_window=None)),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config(**TINY, tie_word_embeddings=True)),
    "qwen3-sharded": (Qwen3ForCausalLM, Qwen3Config(**TINY, head_dim=16)),
}


@dataclass(frozen=True)
class Pair:
    """One model twice: in transformers and in our executor."""

    reference: Any
    config: EngineConfig
    executor: TorchExecutor
    known: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def expected(self, prompt: Sequence[int], new_tokens: int = NEW_TOKENS) -> list[int]:
        """Greedy continuation by transformers, up to its first end token."""
        if tuple(prompt) in self.known:
            return self.known[tuple(prompt)]
        ids = torch.tensor([prompt])
        out = self.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
        self.known[tuple(prompt)] = out[0, len(prompt) :].tolist()
        return self.known[tuple(prompt)]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(7)
    model_class, config = MODELS[request.param]
    reference = model_class(config).eval()
    _randomize_vectors(reference)
    reference.save_pretrained(folder, max_shard_size="60KB" if "sharded" in request.param else "1GB")
    settings = engine_config(str(folder))
    executor = TorchExecutor(settings, "equality")
    yield Pair(reference, settings, executor)
    executor.close()


def _randomize_vectors(model: Any) -> None:
    """Norms start as ones and biases as zeros; a decoder that forgot them would pass."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def engine_config(model: str) -> EngineConfig:
    return EngineConfig(model=model, device="cpu", dtype="float32", block_size=BLOCK_SIZE, kv_blocks=100)


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


def run_engine(
    executor: TorchExecutor,
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    swap: SwapConfig | None = None,
) -> tuple[list[list[int]], int]:
    """Greedy outputs of all prompts at once through the engine core, and how often one was preempted. With
    ``swap``, which must make it happen, no preemption may cost a computation."""
    engine = InProcessEngine(executor, config, swap=swap)
    engine.configure(SchedulerConfig(preemption_policy="swap"))
    ticks = count()
    sampling = SamplingParams(max_tokens=new_tokens, seed=0, temperature=0.0)
    for number, prompt in enumerate(prompts):
        assert engine.submit(RequestSpec(f"r{number}", 1, "f", tuple(prompt), (), sampling), 0.0) is None
    outputs: dict[str, list[int]] = {f"r{number}": [] for number in range(len(prompts))}
    preemptions = 0
    while engine.has_work():
        result = engine.step(lambda: float(next(ticks)))
        preemptions += len(result.preempted)
        for delta in result.deltas.get("f", []):
            assert delta.first_index == len(outputs[delta.request_id])
            outputs[delta.request_id] += delta.tokens
    totals = engine.load().swap
    if swap is not None:
        assert totals is not None and totals.errors == totals.host_full == 0
        assert totals.swapped_out == totals.swapped_in == preemptions
    return list(outputs.values()), preemptions


def test_engine_with_preemption(pair: Pair) -> None:
    """Through the engine core, with chunks of a few tokens and a pool too small for all requests at once."""
    prompts = [prompt_of(length) for length in PROMPT_LENS]
    config = replace(pair.config, kv_blocks=16, max_model_len=60, step_tokens_max=9)
    executor = TorchExecutor(config, "equality-small")
    outputs, preemptions = run_engine(executor, config, prompts, NEW_TOKENS)
    executor.close()
    assert outputs == [pair.expected(prompt) for prompt in prompts]
    assert preemptions > 0


@pytest.mark.parametrize(
    "swap",
    [
        SwapConfig(host_blocks=100, rerank_frequency=1.0, rerank_by="random"),
        SwapConfig(host_blocks=100, rerank_frequency=1.0, rerank_by="random", swap_reuse=False),
        SwapConfig(host_blocks=100, rerank_frequency=1.0, rerank_by="random", swap_async=False),
    ],
    ids=["all", "no-reuse", "synchronous"],
)
def test_engine_with_a_swap_at_every_step(pair: Pair, swap: SwapConfig) -> None:
    """Ranks are drawn anew for every step, so that hardly one passes without somebody going out."""
    prompts = [prompt_of(length) for length in PROMPT_LENS]
    config = replace(pair.config, kv_blocks=16, max_model_len=60, step_tokens_max=64)
    executor = TorchExecutor(config, "equality-swap", swap=swap)
    outputs, preemptions = run_engine(executor, config, prompts, NEW_TOKENS, swap)
    executor.close()
    assert outputs == [pair.expected(prompt) for prompt in prompts]
    assert preemptions > NEW_TOKENS


def test_random_weights_and_draws_depend_on_their_seeds_only() -> None:
    model = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, layers=2, heads=4, kv_heads=2, head_dim=8,
        max_len=64, dtype="float32",
    )  # fmt: skip
    config = replace(engine_config("unused"), dtype="auto")

    def outputs(weights_seed: int, draw_seeds: Sequence[int], chunk_max: int) -> list[list[int]]:
        executor = TorchExecutor.from_random(model, config, seed=weights_seed, pool_name="random")
        driver = Driver(executor)
        requests = [driver.add(prompt_of(9 + seed)) for seed in draw_seeds]
        for request, seed in zip(requests, draw_seeds, strict=True):
            request.sampling = SamplingParams(max_tokens=NEW_TOKENS, seed=seed, top_p=0.9)
        try:
            return driver.run(requests, chunk_max)
        finally:
            executor.close()

    together = outputs(1, [3, 4, 5], 4)
    assert together == [outputs(1, [seed], 1000)[0] for seed in (3, 4, 5)]
    assert together != outputs(2, [3, 4, 5], 4)


SMOLLM2_NEW_TOKENS = 8
SMOLLM2_PROMPT_LENS = (1, 2, 3, 5, 8, 13, 15, 16, 17, 21, 31, 32, 33, 47, 64, 80, 100, 129, 170, 255)
TEXT = """A lighthouse keeper wrote a letter every evening. The ships never answered, but in spring a parcel
came with a compass, three oranges and a map of an island that was on no chart. What would you have done? He
packed his coat, left the lamp burning, and rowed out before dawn. By noon the wind had turned, the oars
were heavy, and he began to count: 1, 2, 3, 5, 8, 13. "If the map is right," he said, "then land must show
in the north-east within two hours." def distance(speed, hours): return speed * hours. The capital of Peru
is Lima; water boils at 100 degrees. He slept."""


@pytest.fixture(scope="module")
def smollm2() -> Iterator[tuple[Pair, list[list[int]]]]:
    """SmolLM2 in both, and 20 prompts of different lengths out of one text."""
    folder = resolve_model("smollm2")
    config = replace(engine_config("smollm2"), kv_blocks=90, step_tokens_max=80)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    executor = TorchExecutor(config, "equality-smollm2")
    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    prompts = [(ids[number:] + ids)[:length] for number, length in enumerate(SMOLLM2_PROMPT_LENS)]
    yield Pair(reference, config, executor), prompts
    executor.close()


def test_smollm2(smollm2: tuple[Pair, list[list[int]]]) -> None:
    """20 prompts batched, in chunks, with preemption, through the engine core; a few of them alone."""
    pair, prompts = smollm2
    expected = [pair.expected(prompt, SMOLLM2_NEW_TOKENS) for prompt in prompts]
    outputs, preemptions = run_engine(pair.executor, pair.config, prompts, SMOLLM2_NEW_TOKENS)
    assert outputs == expected
    assert preemptions > 0
    for number in (0, 8, 16):
        outputs, _ = run_engine(pair.executor, pair.config, [prompts[number]], SMOLLM2_NEW_TOKENS)
        assert outputs == [expected[number]]
