"""Many steps at once are what as many single steps are: tokens, blocks, order, load and what follows."""

from collections.abc import Iterable

from engine_driving import Client, run_out, small_engine, spec, step
from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.core.messages.serving import TokenDelta
from llumnix.core.sampling import SamplingParams
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.request import Request
from llumnix.instance.simulated_executor import simulated_token


def sample(requests: Iterable[Request], count: int) -> list[list[int]]:
    """The next tokens that the simulated executor would give each request."""
    return [
        [simulated_token(request.sampling.seed, len(request.tokens) + ahead) for ahead in range(count)]
        for request in requests
    ]


def advance(engine: InProcessEngine, most: int) -> tuple[int, dict[str, list[TokenDelta]]]:
    """Do what is quiet of the next ``most`` steps: how many, and the last tokens of those that ended."""
    stretch, last = engine.quiet(most), {}
    if stretch.steps:
        ids, last = engine.advance([0.0] * stretch.steps, sample)
        assert len(ids) == stretch.requests
        engine.check()
    return stretch.steps, last


def state(engine: InProcessEngine) -> object:
    """All that an outsider can ask about an engine."""
    rows = engine.rows("i", 0.0)
    movable = [engine.movable(row.request_id) for row in rows]
    outputs = [engine.output_since(row.request_id, 0) for row in rows]
    return rows, movable, outputs, engine.load()._replace(step_s=0.0), engine.has_work()


requests = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(0, 1)), min_size=1, max_size=7
)


@settings(max_examples=100, deadline=None)
@given(requests=requests, warm=st.integers(0, 12), most=st.lists(st.integers(1, 30), max_size=12))
def test_a_stretch_is_its_single_steps(
    requests: list[tuple[int, int, int]], warm: int, most: list[int]
) -> None:
    fast, slow = small_engine(), small_engine()
    for engine in (fast, slow):
        for index, (prompt_len, max_tokens, priority) in enumerate(requests):
            request = spec(
                f"r{index}", prompt_len=prompt_len, max_tokens=max_tokens, execution_priority=priority
            )
            engine.submit(request, float(index))
        for _ in range(warm):
            step(engine)
    for limit in most:
        quiet, last = advance(fast, limit)
        for left in reversed(range(quiet)):
            result = step(slow)
            assert not result.preempted
            assert all(delta.first_index > 0 for deltas in result.deltas.values() for delta in deltas)
            ended = {to: [one for one in deltas if one.finish_reason] for to, deltas in result.deltas.items()}
            assert {to: deltas for to, deltas in ended.items() if deltas} == ({} if left else last)
        assert state(fast) == state(slow)
        if not quiet:
            assert step(fast) == step(slow)
    assert run_out(fast) == run_out(slow)


def test_a_stretch_ends_with_a_request_and_before_blocks_run_out() -> None:
    engine = small_engine(kv_blocks=8)
    engine.submit(spec("a", prompt_len=4, max_tokens=12), 0.0)
    step(engine)
    assert engine.quiet(100).steps == 11  # one token is known, the twelfth ends it
    engine.submit(spec("b", prompt_len=4, max_tokens=20), 0.0)
    step(engine)
    assert engine.quiet(1000).steps > 0
    client, stretches = Client(), 0
    while engine.has_work():
        stretches += advance(engine, 1000)[0] > 0
        step(engine)
    assert stretches >= 2 and not client.tokens


def test_nothing_is_quiet_while_something_else_is_to_be_done() -> None:
    engine = small_engine()
    assert engine.quiet(10).steps == 0
    engine.submit(spec("a", prompt_len=20, max_tokens=12), 0.0)
    assert engine.quiet(10).steps == 0  # to be admitted
    step(engine)
    assert engine.quiet(10).steps == 0  # to be prefilled further
    stops = SamplingParams(max_tokens=9, seed=1, stop_token_ids=(7,))
    other = small_engine()
    other.submit(spec("s", sampling=stops), 0.0)
    step(other)
    assert other.quiet(10).steps == 0  # any token may end it
