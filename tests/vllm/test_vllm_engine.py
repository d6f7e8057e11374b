"""One real vLLM engine under the Engine protocol: requests taken out and put back, preempted, aborted and
refused, with our sampling and with log probabilities."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from small_llama import SAID, small_llama

from llumnix.core.config import EngineConfig, MigrationConfig
from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.serving import FinishReason, RejectCode, RequestSpec
from llumnix.core.sampling import LOGPROBS_MAX, SamplingParams
from llumnix.instance.vllm_engine import VllmEngine
from llumnix.instance.vllm_shared_names import meeting_file
from llumnix.migration.transports import inprocess
from llumnix.migration.transports.base import BlockReader
from llumnix.migration.transports.factory import Readers
from llumnix.runtime.instance_factory import kv_endpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPT = tuple(range(1000, 1055))
CAPACITY_TOKENS = 640
VOCABULARY = 8192
EPOCHS = count(1)  # an engine remembers what has finished, and at which epoch
ANY_EPOCH = 10_000


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    folder = tmp_path_factory.mktemp("model")
    model = small_llama(folder, vocabulary=VOCABULARY)
    ends = {"eos_token_id": list(range(0, VOCABULARY, VOCABULARY // SAID))}  # all that it says
    (folder / "generation_config.json").write_text(json.dumps(ends))
    config = EngineConfig(
        kind="vllm",
        model=model,
        device="cpu",
        dtype="float32",
        kv_blocks=CAPACITY_TOKENS // 16,
        max_model_len=512,
        staging_gib=0.05,
        step_tokens_max=64,
        threads=1,
        # Without prefix caching, so that only what was copied can be found.
        engine_args="enforce_eager=true;block_size=32;enable_prefix_caching=false",
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


def copy_here(engine: VllmEngine) -> BlockReader:
    """A reader of the engine's own pool: a move from it to itself."""
    inprocess.offer(engine.pool)
    readers = engine.readers(Readers(engine.pool, MigrationConfig(transport="inprocess")))
    return readers.open(kv_endpoint(engine.pool, ""))


def test_stages_are_in_vllm_before_the_request_joins(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier, loads = engine._core.exchange.copier, []
    copy_in = copier.copy_in

    def noted(pool: Any, pool_blocks: Any, blocks: Any, *, first: int, end: int) -> None:
        loads.append((first, end))
        copy_in(pool, pool_blocks, blocks, first=first, end=end)

    monkeypatch.setattr(copier, "copy_in", noted)
    prompt = tuple(range(3000, 3150))
    undisturbed = Run(engine, spec("a", prompt)).out()["a"]
    reader, run = copy_here(engine), Run(engine, spec("a", prompt, seed=4))
    run.step(6)
    assert engine.begin_move("a") == ""
    engine.movable("a")
    while (state := engine.movable("a")) is None or state.lagging:
        pass
    free = engine._core.exchange.free_blocks()
    reserved = engine.reserve("m", state.full_blocks + 2)
    assert reserved is not None
    assert free - engine._core.exchange.free_blocks() == (state.full_blocks + 2) * 16 // 32
    assert engine.load().used_blocks == -(-state.computed_tokens // 32) * 2
    reader.read(state.blocks[: state.full_blocks], reserved[: state.full_blocks], 1.0)
    run.step(2)
    last, moving = engine.take_out("a"), engine.spec_of("a", 0.0)
    rest = reserved[state.full_blocks : len(last.blocks)]
    reader.read(last.blocks[state.full_blocks :], rest, 1.0, urgent=True)
    engine.release("a")
    engine.end_move("a")
    arrived = replace(moving, request_id="b", epoch=next(EPOCHS))
    assert engine.adopt("m", arrived, last.computed_tokens, 0.0) is None
    run.said["b"] = list(arrived.output_tokens)
    live = engine._core.entered["b"].live
    run.step()
    assert live.num_computed_tokens == last.computed_tokens + 1
    ahead = state.full_blocks * 16 // 32 * 32
    assert loads == [(0, ahead), (ahead, last.computed_tokens)]
    assert run.out()["b"] == undisturbed


def test_running_requests_take_back_what_an_arrival_holds(engine: VllmEngine) -> None:
    prompt, most = tuple(range(3200, 3300)), 90
    undisturbed = Run(engine, spec("a", prompt, max_tokens=most)).out()["a"]
    others = [
        spec(name, tuple(range(at, at + 55)), max_tokens=180) for name, at in (("c", 4000), ("d", 5000))
    ]
    reader, run = copy_here(engine), Run(engine, spec("a", prompt, max_tokens=most), *others)
    run.step(12)
    assert engine.begin_move("a") == ""
    while (state := engine.movable("a")) is None or state.lagging:
        pass
    reserved = engine.reserve("m", state.full_blocks + 4)
    assert reserved is not None
    reader.read(state.blocks[: state.full_blocks], reserved[: state.full_blocks], 1.0)
    arrivals = engine._core.arrivals
    before = arrivals.blocks
    while arrivals.blocks:
        run.step()
        assert engine.holds("a"), "nobody needed the blocks"
    assert before > 0 and engine.load().reserved_blocks == len(reserved)
    state = engine.movable("a")
    assert state is not None and not state.waiting
    reserved = engine.reserve("m", max(len(reserved), len(state.blocks))) or reserved
    last, moving = engine.take_out("a"), engine.spec_of("a", 0.0)
    assert len(last.blocks) <= len(reserved)
    reader.read(last.blocks, reserved[: len(last.blocks)], 1.0, urgent=True)
    engine.release("a")
    engine.end_move("a")
    arrived = replace(moving, request_id="b", epoch=next(EPOCHS))
    assert engine.adopt("m", arrived, last.computed_tokens, 0.0) is None
    run.said["b"] = list(arrived.output_tokens)
    assert run.out()["b"] == undisturbed


def test_what_is_released_or_aborted_is_gone(engine: VllmEngine) -> None:
    run = Run(engine, spec("a"), spec("b"), spec("c"), spec("d"))
    run.step(6)
    before = {name: len(tokens) for name, tokens in run.said.items()}
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
    assert {name: len(tokens) for name, tokens in said.items()} == {**before, "c": 24, "d": 24}


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


def test_what_a_head_lacks_is_told_and_who_could_make_room(engine: VllmEngine) -> None:
    running = [spec(f"r{n}", tuple(range(400 * n, 400 * n + 200)), max_tokens=40) for n in range(2)]
    run = Run(engine, *running, spec("q", tuple(range(900, 1200))))
    run.step(10)
    load = engine.load()
    assert (load.running, load.waiting, load.head_blocks) == (2, 1, 19)
    assert load.head_missing_blocks == 19 - (load.capacity_blocks - load.used_blocks) > 0
    assert load.head_arrived_at > 0
    assert {one.request_id: one.waiting for one in load.candidates} == {"r0": False, "r1": False, "q": True}
    run.out()
    assert engine.load().head_missing_blocks == 0


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


def test_end_tokens_that_are_ignored_may_come_before_min_tokens(engine: VllmEngine) -> None:
    plain = Run(engine, spec("p")).out()["p"]
    assert Run(engine, spec("m", min_tokens=20)).out()["m"] == plain
    run = Run(engine, spec("e", ignore_eos=False))
    assert run.out()["e"] == plain[:1] and run.reasons == {"e": FinishReason.STOP}


def test_stop_tokens_outside_the_vocabulary_never_come(engine: VllmEngine) -> None:
    plain = Run(engine, spec("p")).out()["p"]
    new = next(place for place in range(4, len(plain)) if plain[place] not in plain[:place])
    run = Run(engine, spec("s", stop_token_ids=(VOCABULARY, plain[new])))
    assert run.out()["s"] == plain[: new + 1]
    assert run.reasons == {"s": FinishReason.STOP}


def test_as_many_log_probabilities_as_can_be_asked_for(engine: VllmEngine) -> None:
    run = Run(engine, spec("l", logprobs=LOGPROBS_MAX))
    run.out()
    assert {len(one.top) for one in run.logprobs["l"]} == {LOGPROBS_MAX}


def test_the_file_in_which_a_rank_alone_met_nobody_is_gone(engine: VllmEngine) -> None:
    (told,) = engine._core._vllm.collective_rpc(lambda worker: worker.distributed_init_method)
    file = meeting_file(told)
    assert file is not None and not file.exists()


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
    with pytest.raises(ConfigurationError, match="block_size must be a positive number, got 'x'"):
        VllmEngine(EngineConfig(kind="vllm", kv_blocks=4, engine_args="block_size=x"), "never")
    with pytest.raises(ConfigurationError, match="vLLM has no argument no_such_thing"):
        VllmEngine(EngineConfig(kind="vllm", engine_args="no_such_thing=1"), "never")
