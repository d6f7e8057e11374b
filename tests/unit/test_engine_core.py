"""The engine core's answers: what it refuses, when a request ends, and what it reports."""

from dataclasses import replace

import pytest
from engine_driving import FRONTEND, Client, refusal_code, run_out, small_engine, spec, step, undisturbed

from llumnix.core.epochs import FIRST_EPOCH, next_generation, next_hop
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import RequestStatus
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.messages.serving import FinishReason, RejectCode
from llumnix.core.sampling import SamplingParams
from llumnix.instance import finished_outputs
from llumnix.instance.executor import SampledToken
from llumnix.instance.finished_outputs import FinishedOutputs
from llumnix.instance.request import Request
from llumnix.instance.simulated_executor import EOS_TOKEN, VOCAB_SIZE

# Submitting.


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (spec("r", prompt_len=0), "empty"),
        (spec("r", prompt_len=60, max_tokens=5), "64 tokens that fit"),
        (replace(spec("r"), prompt_tokens=(1, VOCAB_SIZE)), "vocabulary"),
        (replace(spec("r"), prompt_tokens=(-1,)), "vocabulary"),
        (spec("r", output=(1, 2, 3, 4), max_tokens=4), "generated already"),
        (spec("r", waited_s=float("nan")), "waited_s"),
        (spec("r", waited_s=float("-inf")), "waited_s"),
    ],
)
def test_a_request_that_can_never_run_is_invalid(bad: object, words: str) -> None:
    engine = small_engine(kv_blocks=16)
    refusal = engine.submit(bad, 0.0)  # type: ignore[arg-type]
    assert refusal is not None and refusal.code is RejectCode.INVALID and words in refusal.reason
    assert not engine.holds("r")


def test_the_longest_request_that_fits_the_pool_runs_to_its_end() -> None:
    engine = small_engine(kv_blocks=4)
    assert engine.max_model_len == 16
    assert engine.submit(spec("r", prompt_len=6, max_tokens=10), 0.0) is None
    client = Client()
    run_out(engine, client)
    assert len(client.tokens["r"]) == 10


def test_settings_bound_the_length_further() -> None:
    assert small_engine(max_model_len=10).max_model_len == 10


def test_a_full_queue_refuses_and_keeps_nothing() -> None:
    engine = small_engine(waiting_max=2)
    assert engine.submit(spec("a"), 0.0) is None and engine.submit(spec("b"), 0.0) is None
    assert refusal_code(engine.submit(spec("c"), 0.0)) is RejectCode.QUEUE_FULL
    assert not engine.holds("c")
    newer = spec("b", epoch=next_generation(FIRST_EPOCH))
    assert engine.submit(newer, 0.0) is None, "it takes the place of its older self"


def test_only_a_higher_epoch_replaces() -> None:
    engine = small_engine()
    request = spec("r", prompt_len=5)
    engine.submit(request, 0.0)
    step(engine)
    assert refusal_code(engine.submit(request, 1.0)) is RejectCode.INVALID
    newer = next_generation(FIRST_EPOCH)
    output = undisturbed(request)[:1]
    assert engine.submit(replace(request, epoch=newer, output_tokens=output), 1.0) is None
    engine.check()
    result = step(engine)
    (delta,) = result.deltas[FRONTEND]
    assert (delta.epoch, delta.first_index, delta.tokens) == (newer, 1, undisturbed(request)[1:2])


def test_a_repeated_submit_of_a_finished_request_does_not_run_again() -> None:
    engine = small_engine()
    engine.submit(spec("r"), 0.0)
    run_out(engine)
    assert refusal_code(engine.submit(spec("r"), 1.0)) is RejectCode.INVALID
    assert engine.submit(spec("r", epoch=next_generation(FIRST_EPOCH)), 1.0) is None


# Ending.


def test_a_continuation_goes_on_where_it_stopped() -> None:
    request = spec("r", prompt_len=5, max_tokens=9)
    whole = undisturbed(request)
    engine = small_engine(step_tokens_max=64)
    engine.submit(replace(request, output_tokens=whole[:4]), 0.0)
    deltas = [delta for result in run_out(engine) for delta in result.deltas[FRONTEND]]
    assert [delta.first_index for delta in deltas] == [4, 5, 6, 7, 8]
    assert tuple(token for delta in deltas for token in delta.tokens) == whole[4:]
    assert [delta.finish_reason for delta in deltas][-2:] == [None, FinishReason.LENGTH]


def ended_by(sampling: SamplingParams, tokens: list[int]) -> tuple[int, FinishReason | None]:
    """Feed tokens in until the request ends; how many it took, and why it ended."""
    engine = small_engine()
    engine.submit(spec("r", sampling=sampling), 0.0)
    for count, token in enumerate(tokens, 1):
        result = engine.apply(engine.schedule(0.0), [SampledToken(token)], 0.0, 0.01)
        (delta,) = result.deltas[FRONTEND]
        assert delta.tokens == (token,)
        if result.finished:
            assert result.finished == ("r",) and not engine.has_work()
            engine.check()
            return count, delta.finish_reason
    return len(tokens), None


def test_finish_rules() -> None:
    def params(**settings: object) -> SamplingParams:
        return SamplingParams(**{"max_tokens": 5, "seed": 1, **settings})  # type: ignore[arg-type]

    stop, length = FinishReason.STOP, FinishReason.LENGTH
    eos = EOS_TOKEN
    assert ended_by(params(), [1, 2, eos, 3]) == (3, stop)
    assert ended_by(params(ignore_eos=True), [1, eos, 2, 3, 4]) == (5, length)
    assert ended_by(params(stop_token_ids=(7,)), [1, 7]) == (2, stop)
    assert ended_by(params(stop_token_ids=(7,), ignore_eos=True), [eos, 7]) == (2, stop)
    assert ended_by(params(min_tokens=3, stop_token_ids=(7,)), [7, eos, 7]) == (3, stop)
    assert ended_by(params(), [1, 2, 3, 4, 5]) == (5, length)
    assert ended_by(params(max_tokens=1), [eos]) == (1, stop)


def test_output_since_tells_held_and_finished_requests() -> None:
    engine = small_engine()
    request = spec("r", max_tokens=3)
    whole = undisturbed(request)
    assert engine.output_since("r", 0) is None
    engine.submit(request, 0.0)
    step(engine)
    step(engine)
    held = engine.output_since("r", 1)
    assert held is not None and (held.first_index, held.tokens, held.finish_reason) == (1, whole[1:2], None)
    run_out(engine)
    ended = engine.output_since("r", 1)
    assert ended is not None
    assert (ended.first_index, ended.tokens, ended.finish_reason) == (1, whole[1:], FinishReason.LENGTH)
    assert not engine.abort("r", FIRST_EPOCH)
    assert engine.output_since("r", 0) is None


def test_an_older_output_is_forgotten_when_the_request_returns() -> None:
    engine = small_engine()
    engine.submit(spec("r"), 0.0)
    run_out(engine)
    engine.submit(spec("r", epoch=next_generation(FIRST_EPOCH)), 1.0)
    engine.take_out("r")
    engine.release("r")
    assert engine.output_since("r", 0) is None


def test_finished_outputs_are_bounded_by_count_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished_outputs, "REQUESTS_MAX", 3)
    monkeypatch.setattr(finished_outputs, "TOKENS_MAX", 10)
    outputs = FinishedOutputs()
    for name in "abcd":
        outputs.add(Request.from_spec(spec(name, output=(1,)), 0.0), FinishReason.STOP)
    assert outputs.get("a") is None and outputs.get("b") is not None and len(outputs) == 3
    outputs.add(Request.from_spec(spec("long", output=(1,) * 9), 0.0), FinishReason.STOP)
    assert outputs.get("c") is None and outputs.get("d") is not None and len(outputs) == 2


def test_abort_frees_at_once_wherever_the_request_is() -> None:
    engine = small_engine(batch_max=2, step_tokens_max=64)
    for index, name in enumerate(("running", "out", "waiting")):
        engine.submit(spec(name), float(index))
    step(engine)
    engine.take_out("out")
    for name in ("running", "out", "waiting"):
        assert not engine.abort(name, FIRST_EPOCH - 1)
        assert engine.holds(name)
        assert engine.abort(name, next_hop(FIRST_EPOCH))
        assert not engine.holds(name)
        engine.check()
    assert not engine.abort("running", FIRST_EPOCH)
    assert engine.load().used_blocks == 0 and not engine.has_work()


def test_an_executor_that_returns_a_wrong_number_is_a_bug() -> None:
    for tokens in ([], [SampledToken(1), SampledToken(2)]):
        engine = small_engine()
        engine.submit(spec("r"), 0.0)
        with pytest.raises(InvariantError):
            engine.apply(engine.schedule(0.0), tokens, 0.0, 0.0)


# Reporting.


def test_deltas_are_grouped_by_frontend() -> None:
    engine = small_engine(step_tokens_max=64)
    for name, frontend in (("a", "tcp://f:1"), ("b", "tcp://f:2"), ("c", "tcp://f:1")):
        engine.submit(spec(name, frontend=frontend), 0.0)
    deltas = step(engine).deltas
    assert {address: [delta.request_id for delta in sent] for address, sent in deltas.items()} == {
        "tcp://f:1": ["a", "c"],
        "tcp://f:2": ["b"],
    }


def test_load_counts_blocks_and_requests() -> None:
    engine = small_engine(batch_max=2, step_tokens_max=64)
    engine.submit(spec("a", prompt_len=9, max_tokens=3, execution_priority=2), 0.0)
    engine.submit(spec("b", prompt_len=5), 1.0)
    engine.submit(spec("c", prompt_len=6), 2.0)
    engine.submit(spec("d", prompt_len=3), 3.0)
    assert engine.reserve("m", 0) == ()
    result = engine.step(iter([10.0, 10.5]).__next__)
    assert (result.tokens, result.duration_s) == (14, 0.5)
    load = engine.load()
    assert (load.capacity_blocks, load.used_blocks, load.reserved_blocks) == (16, 5, 0)
    assert (load.running, load.waiting, load.head_blocks, load.waiting_blocks) == (2, 2, 2, 3)
    assert load.execution_priorities == ((0, 1), (2, 1))
    assert (load.step_s, load.tokens_total, load.finished_total) == (0.5, 2, 0)
    assert load.candidates == (
        MoveCandidate("d", 1, 0, True, 3, 0, 3.0),
        MoveCandidate("c", 2, 0, True, 6, 0, 2.0),
        MoveCandidate("b", 2, 0, False, 6, 1, 1.0),
        MoveCandidate("a", 3, 2, False, 10, 1, 0.0),
    )


def test_step_s_is_a_recent_mean() -> None:
    engine = small_engine()
    engine.submit(spec("r", max_tokens=40), 0.0)
    for _ in range(39):
        engine.apply(engine.schedule(0.0), [SampledToken(1)], 0.0, 0.25)
    engine.apply(engine.schedule(0.0), [SampledToken(1)], 0.0, 1.25)
    assert engine.load().step_s == pytest.approx(0.35)
    engine.apply(engine.schedule(0.0), [], 0.0, 100.0)
    assert engine.load().step_s == pytest.approx(0.35), "a step without work says nothing"


def test_rows_show_running_ones_first() -> None:
    engine = small_engine(batch_max=2, step_tokens_max=64)
    for index, name in enumerate(("a", "b", "c")):
        engine.submit(spec(name, prompt_len=5), float(index))
    step(engine)
    engine.take_out("a")
    rows = engine.rows("instance-0", 10.0)
    assert [(row.request_id, row.status) for row in rows] == [
        ("b", RequestStatus.RUNNING),
        ("a", RequestStatus.MIGRATING),
        ("c", RequestStatus.WAITING),
    ]
    assert (rows[0].blocks, rows[0].prompt_tokens, rows[0].output_tokens, rows[0].age_s) == (2, 5, 1, 9.0)
    assert engine.load().candidates[-1].request_id == "b", "one taken out is not offered"


def test_what_was_missed_comes_with_its_log_probabilities_if_all_are_known_here() -> None:
    engine = small_engine()
    sampling = SamplingParams(max_tokens=4, seed=7, logprobs=2, ignore_eos=True)
    engine.submit(replace(spec("r"), sampling=sampling), 0.0)
    engine.submit(replace(spec("moved"), sampling=sampling, output_tokens=(1,)), 0.0)
    for _ in range(3):
        engine.step(lambda: 0.0)
    held = engine.output_since("r", 1)
    assert held is not None
    assert len(held.logprobs) == len(held.tokens) == 2
    run_out(engine)
    ended = engine.output_since("r", 1)
    assert ended is not None
    assert ended.logprobs[:2] == held.logprobs
    assert len(ended.logprobs) == 3
    assert engine.output_since("moved", 0).logprobs == ()  # type: ignore[union-attr]
    assert len(engine.output_since("moved", 1).logprobs) == 3  # type: ignore[union-attr]
