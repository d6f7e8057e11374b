"""One real vLLM engine under the Engine protocol: requests taken out and put back, preempted, aborted and
refused, with our sampling and with log probabilities."""

import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.serving import FinishReason, RejectCode, RequestSpec
from llumnix.core.sampling import SamplingParams
from llumnix.instance.vllm_engine import VllmEngine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPT = tuple(range(1000, 1055))
CAPACITY_TOKENS = 640
EPOCHS = count(1)  # an engine remembers what has finished, and at which epoch
ANY_EPOCH = 10_000


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    config = EngineConfig(
        kind="vllm",
        model="smollm2",
        device="cpu",
        dtype="float32",
        kv_blocks=CAPACITY_TOKENS // 16,
        max_model_len=512,
        staging_gib=0.05,
        step_tokens_max=64,
        threads=1,
        engine_args="enforce_eager=true;block_size=32",
    )
    engine = VllmEngine(config, "test-pool")
    yield engine
    engine.close()


def spec(name: str, prompt: tuple[int, ...] = PROMPT, **sampling: Any) -> RequestSpec:
    params = {"max_tokens": 24, "seed": 3, "temperature": 0.0, "ignore_eos": True, **sampling}
    priority = int(name.startswith("urgent"))
    return RequestSpec(name, next(EPOCHS), "f", prompt, (), SamplingParams(**params), 0, priority)


class Run:
    """Steps an engine and keeps what each request said."""

    def __init__(self, engine: VllmEngine, *specs: RequestSpec) -> None:
        self.engine = engine
        self.said: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.logprobs: dict[str, list[Any]] = {}
        self.preempted: list[str] = []
        for one in specs:
            assert engine.submit(one, time.monotonic()) is None

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            result = self.engine.step(time.monotonic)
            self.preempted += result.preempted
            for delta in result.deltas.get("f", []):
                said = self.said.setdefault(delta.request_id, [])
                assert delta.first_index == len(said)
                said += delta.tokens
                self.logprobs.setdefault(delta.request_id, []).extend(delta.logprobs)
                if delta.finish_reason is not None:
                    self.reasons[delta.request_id] = delta.finish_reason

    def out(self) -> dict[str, list[int]]:
        steps = 0
        while self.engine.has_work():
            self.step()
            steps += 1
            assert steps < 2000
        load = self.engine.load()
        assert (load.used_blocks, load.reserved_blocks, load.running, load.waiting) == (0, 0, 0, 0)
        self.engine._staging.blocks.check()
        assert self.engine._staging.blocks.owned_blocks == 0
        return self.said


def test_a_refused_commit_leaves_the_request_as_it_was(engine: VllmEngine) -> None:
    undisturbed = Run(engine, spec("a"), spec("b", temperature=0.8, repetition_penalty=1.2)).out()
    run = Run(engine, spec("a"), spec("b", temperature=0.8, repetition_penalty=1.2))
    run.step(5)
    for name in ("a", "b"):
        assert engine.begin_move(name) == ""
        engine.movable(name)
    run.step(2)
    for name in ("a", "b"):
        state = engine.take_out(name)
        assert len(state.blocks) * 16 >= state.computed_tokens == state.known_tokens - 1
    assert not engine.has_work()
    for name in ("a", "b"):
        engine.put_back(name, next(EPOCHS))
        engine.end_move(name)
    assert run.out() == undisturbed


def test_what_is_released_or_aborted_is_gone(engine: VllmEngine) -> None:
    run = Run(engine, spec("a"), spec("b"), spec("c"), spec("d"))
    run.step(3)
    for name in ("a", "b", "c"):
        assert engine.begin_move(name) == ""
        engine.movable(name)
    engine.take_out("a")
    engine.release("a")
    assert engine.abort("b", ANY_EPOCH)
    engine.end_move("b")
    assert not engine.abort("c", 0)
    engine.end_move("c")
    said = run.out()
    assert not engine.holds("a")
    assert {name: len(tokens) for name, tokens in said.items()} == {"a": 3, "b": 3, "c": 24, "d": 24}


def test_a_waiting_request_moves_without_kv(engine: VllmEngine) -> None:
    run = Run(engine, spec("a"))
    state = engine.take_out("a")
    assert (state.waiting, state.blocks, state.computed_tokens) == (True, (), 0)
    engine.put_back("a", next(EPOCHS))
    assert len(run.out()["a"]) == 24


def test_preempted_requests_say_the_same_and_priorities_are_ours(engine: VllmEngine) -> None:
    names = ["urgent0", "calm1", "calm2"]
    prompts = {name: tuple(range(2000 + 300 * n, 2090 + 300 * n)) for n, name in enumerate(names)}
    alone = {
        name: Run(engine, spec(name, prompt, max_tokens=180)).out()[name] for name, prompt in prompts.items()
    }
    run = Run(engine, *(spec(name, prompt, max_tokens=180) for name, prompt in prompts.items()))
    assert run.out() == alone
    assert run.preempted
    assert "urgent0" not in run.preempted
    assert engine.load().preemptions_total == len(run.preempted)


def test_stops_lengths_and_log_probabilities(engine: VllmEngine) -> None:
    plain = Run(engine, spec("p")).out()["p"]
    stop = plain[5]
    cut = plain.index(stop) + 1
    run = Run(engine, spec("s", stop_token_ids=(stop,)), spec("l", logprobs=2), spec("n", logprobs=0))
    said = run.out()
    assert said["s"] == plain[:cut]
    assert run.reasons == {"s": FinishReason.STOP, "l": FinishReason.LENGTH, "n": FinishReason.LENGTH}
    assert said["l"] == plain
    for token, logprob in zip(plain, run.logprobs["l"], strict=True):
        assert logprob.top[0][0] == token and logprob.top[0][1] == logprob.logprob
        assert len(logprob.top) == 2
    assert all(one.top == () and one.logprob <= 0 for one in run.logprobs["n"])


def test_refusals(engine: VllmEngine) -> None:
    too_long = engine.submit(spec("x", tuple(range(600))), 0.0)
    assert too_long is not None and too_long.code is RejectCode.INVALID
    assert engine.reserve("m", 100_000) is None
    blocks = engine.reserve("m", 3)
    assert blocks is not None and len(blocks) == 3
    refused = engine.adopt("m", spec("y"), 60, 0.0)
    assert refused is not None and "cannot lie in room" in refused.reason
    engine.cancel_reservation("m")
    assert engine.load().reserved_blocks == 0


def test_vllm_that_cannot_start_says_why_in_a_line() -> None:
    config = EngineConfig(kind="vllm", model="smollm2", engine_args="quantization=no_such_thing")
    with pytest.raises(ConfigurationError, match=r"vLLM did not start: .*no_such_thing") as caught:
        VllmEngine(config, "never")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="vLLM has no argument no_such_thing"):
        VllmEngine(EngineConfig(kind="vllm", engine_args="no_such_thing=1"), "never")
