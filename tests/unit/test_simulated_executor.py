"""The simulated executor: reproducible tokens, a cost by formula, and in real time KV that is really
checked."""

from dataclasses import replace

import pytest
from engine_driving import FRONTEND, Client, run_out, small_engine, spec, step, undisturbed

from llumnix.core.config import EngineConfig
from llumnix.core.epochs import FIRST_EPOCH, next_hop
from llumnix.core.errors import InvariantError
from llumnix.core.sampling import SamplingParams
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.real_time_simulated_executor import RealTimeSimulatedExecutor
from llumnix.instance.simulated_executor import SimulatedExecutor, simulated_token


def test_simulated_tokens_follow_from_seed_and_position() -> None:
    tokens = [simulated_token(3, position) for position in range(200)]
    assert tokens == [simulated_token(3, position) for position in range(200)]
    assert tokens != [simulated_token(4, position) for position in range(200)]
    assert all(chr(token).isprintable() for token in tokens) and len(set(tokens)) > 10


def test_a_simulated_step_costs_by_its_tokens() -> None:
    config = EngineConfig(kind="simulated", simulated_step_ms=10.0, simulated_token_ms=0.5)
    executor = SimulatedExecutor(config)
    engine = small_engine()
    assert executor.cost_s(engine.schedule(0.0)) == 0.0
    engine.submit(spec("r", prompt_len=6), 0.0)
    assert executor.cost_s(engine.schedule(0.0)) == pytest.approx(0.013)


def test_a_simulated_engine_reports_logprobs_when_asked() -> None:
    engine = small_engine()
    engine.submit(spec("r", sampling=SamplingParams(max_tokens=1, seed=1, logprobs=2)), 0.0)
    (delta,) = step(engine).deltas[FRONTEND]
    assert [entry.top[0][0] for entry in delta.logprobs] == list(delta.tokens)


def real_time_engine(pool_name: str) -> tuple[InProcessEngine, RealTimeSimulatedExecutor]:
    config = EngineConfig(
        kind="simulated", block_size=4, kv_blocks=16, simulated_step_ms=0.0, simulated_token_ms=0.0
    )
    executor = RealTimeSimulatedExecutor(config, pool_name)
    return InProcessEngine(executor, config), executor


def test_in_real_time_the_tokens_are_the_same() -> None:
    engine, executor = real_time_engine("a")
    request = spec("r", prompt_len=9, max_tokens=12)
    engine.submit(request, 0.0)
    client = Client()
    run_out(engine, client)
    assert tuple(client.tokens["r"]) == undisturbed(request)
    executor.close()


@pytest.mark.parametrize("spoilt", [None, 0, 2])
def test_moved_kv_must_have_arrived_in_every_block(spoilt: int | None) -> None:
    source, source_executor = real_time_engine("a")
    target, target_executor = real_time_engine("b")
    request, client = spec("r", prompt_len=9, max_tokens=8), Client()
    target.submit(spec("other", prompt_len=5), 0.0)
    source.submit(request, 0.0)
    step(source, client)
    state = source.take_out("r")
    blocks = target.reserve("m", len(state.blocks))
    assert blocks is not None
    for index, (theirs, ours) in enumerate(zip(state.blocks, blocks, strict=True)):
        if index != spoilt:
            target_executor.pool.tensor[ours] = source_executor.pool.tensor[theirs]
    travelling = replace(source.spec_of("r", 0.0), epoch=next_hop(FIRST_EPOCH))
    assert target.adopt("m", travelling, state.computed_tokens, 0.0) is None
    if spoilt is None:
        run_out(target, client)
        assert tuple(client.tokens["r"]) == undisturbed(request)
    else:
        with pytest.raises(InvariantError, match="KV of r"):
            step(target)
    source_executor.close()
    target_executor.close()


def test_kv_overwritten_later_is_noticed_within_a_block() -> None:
    engine, executor = real_time_engine("a")
    engine.submit(spec("r", prompt_len=9, max_tokens=12), 0.0)
    step(engine)
    executor.pool.tensor.zero_()
    with pytest.raises(InvariantError):
        for _ in range(4):
            step(engine)
    executor.close()
