"""A vLLM engine that decodes speculatively: whatever is accepted in a step, and whether a request is stopped
within one, taken out after it or preempted, it says what the reference implementation says."""

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_vllm_engine import EPOCHS, Run, spec
from transformers import AutoModelForCausalLM, AutoTokenizer

from llumnix.core.config import EngineConfig
from llumnix.core.messages.serving import FinishReason, RejectCode
from llumnix.instance.model_loader import resolve_model
from llumnix.instance.vllm_engine import VllmEngine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

TEXTS = (
    "The river ran past the old mill and the river ran past the old mill and the river ran past",
    "one two three four one two three four one two three four one two three",
    "A list of the days of the week: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday,",
)
NEW_TOKENS = 120
GUESSES = 3
SPECULATION = 'speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    config = EngineConfig(
        kind="vllm",
        model="smollm2",
        device="cpu",
        dtype="float32",
        kv_blocks=20,
        max_model_len=256,
        staging_gib=0.05,
        threads=1,
        engine_args=f"enforce_eager=true;block_size=32;enable_prefix_caching=false;{SPECULATION}",
    )
    engine = VllmEngine(config, "test-speculation")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    return [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]


@pytest.fixture(scope="module")
def reference(prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """What greedy decoding gives, end tokens or not."""
    model: Any = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2"), dtype=torch.float32).eval()
    said = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens, cache = torch.tensor([prompt]), None
            found: list[int] = []
            while len(found) < NEW_TOKENS:
                step = model(tokens, past_key_values=cache, use_cache=True)
                tokens, cache = step.logits[:, -1:].argmax(dim=-1), step.past_key_values
                found.append(int(tokens))
            said.append(found)
    return said


def bunches(run: Run, name: str) -> list[int]:
    """Step until the end; tokens of a request after each step."""
    counts = [0]
    while run.engine.has_work():
        run.step()
        counts.append(len(run.said.get(name, ())))
    return counts


def test_tokens_come_in_bunches_and_are_the_same(engine: VllmEngine, prompts: Any, reference: Any) -> None:
    run = Run(engine, spec("a", prompts[0], max_tokens=NEW_TOKENS))
    counts = bunches(run, "a")
    assert max(after - before for before, after in pairwise(counts)) == GUESSES + 1
    assert run.out()["a"] == reference[0]
    assert engine.load().tokens_total == NEW_TOKENS


def test_stops_and_lengths_within_a_bunch(engine: VllmEngine, prompts: Any, reference: Any) -> None:
    (plain,) = reference[:1]
    counts = bunches(Run(engine, spec("a", prompts[0], max_tokens=NEW_TOKENS)), "a")
    end = next(before + 2 for before, after in pairwise(counts) if after - before == GUESSES + 1)
    new = next(place for place in range(end, NEW_TOKENS) if plain[place] not in plain[:place])
    run = Run(
        engine,
        spec("length", prompts[0], max_tokens=end),
        spec("stop", prompts[0], max_tokens=NEW_TOKENS, stop_token_ids=(plain[new],), logprobs=1),
    )
    said = run.out()
    assert said == {"length": plain[:end], "stop": plain[: new + 1]}
    assert run.reasons == {"length": FinishReason.LENGTH, "stop": FinishReason.STOP}
    assert [one.top[0][0] for one in run.logprobs["stop"]] == said["stop"]


def test_a_request_leaves_between_bunches_and_enters_again(
    engine: VllmEngine, prompts: Any, reference: Any
) -> None:
    few = prompts[:2]
    run = Run(engine, *(spec(str(n), prompt, max_tokens=NEW_TOKENS) for n, prompt in enumerate(few)))
    moves = 0
    while engine.has_work():
        run.step(3)
        for name in [name for name in map(str, range(len(few))) if engine.holds(name)]:
            assert engine.begin_move(name) == ""
            engine.movable(name)
            state = engine.take_out(name)
            assert state.computed_tokens == state.known_tokens - 1
            assert len(state.blocks) == -(-state.computed_tokens // 16)  # none for tokens only guessed
            engine.put_back(name, next(EPOCHS))
            engine.end_move(name)
            moves += 1
    assert moves > 30
    assert run.out() == {str(n): tokens for n, tokens in enumerate(reference[:2])}


def test_preempted_requests_say_the_same(engine: VllmEngine, prompts: Any, reference: Any) -> None:
    names = ["urgent0", "calm1", "calm2"]
    run = Run(engine, *(spec(n, p, max_tokens=NEW_TOKENS) for n, p in zip(names, prompts, strict=True)))
    assert run.out() == dict(zip(names, reference, strict=True))
    assert run.preempted and "urgent0" not in run.preempted


def test_what_vllm_could_not_draw_alike_is_refused(engine: VllmEngine) -> None:
    refusal = engine.submit(spec("x", temperature=0.7), time.monotonic())
    assert refusal is not None and refusal.code is RejectCode.INVALID
