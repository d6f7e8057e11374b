"""Ranks that change while requests run: drawn from a trace, or by service to tenants."""

from dataclasses import replace
from itertools import pairwise

from engine_driving import run_out, spec, step
from swap_driving import swapping_engine

from llumnix.core.config import SchedulerConfig, SwapConfig
from llumnix.core.messages.control import RequestStatus
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.priority_trace import MARKOV_STAY, PriorityTrace
from llumnix.instance.ranking import Ranking
from llumnix.instance.tenant_counters import TenantCounters


def running(engine: InProcessEngine) -> set[str]:
    return {row.request_id for row in engine.rows("i", 0.0) if row.status is RequestStatus.RUNNING}


def test_random_ranks_are_even_and_independent_of_the_last() -> None:
    trace = PriorityTrace(1, markov=False)
    ranks = [trace.rank("r", draw) for draw in range(4000)]
    assert 0.48 < sum(ranks) / len(ranks) < 0.52 and len(set(ranks)) == 4000
    above = [after for before, after in pairwise(ranks) if before > 0.5]
    assert 0.47 < sum(above) / len(above) < 0.53


def test_markov_ranks_mostly_stay() -> None:
    trace = PriorityTrace(1, markov=True)
    kept = [trace.rank("r", draw) == trace.rank("r", draw - 1) for draw in range(1, 4000)]
    assert abs(sum(kept) / len(kept) - MARKOV_STAY) < 0.03
    assert trace.rank("r", 9) != trace.rank("s", 9)
    assert PriorityTrace(2, markov=True).rank("r", 9) != trace.rank("r", 9)


def test_a_trace_lets_everybody_run_before_anybody_has_ended() -> None:
    engine, _ = swapping_engine(swap=SwapConfig(rerank_frequency=0.5, rerank_by="random"))
    for index, name in enumerate("abcd"):
        engine.submit(spec(name, prompt_len=20, max_tokens=40), float(index))
    seen: set[str] = set()
    while engine.load().finished_total == 0:
        step(engine)
        seen |= running(engine)
    assert seen == set("abcd")
    run_out(engine)


def test_ranks_of_requests_that_are_gone_are_not_kept() -> None:
    for frequency in (0.0, 0.5):
        config = SwapConfig(rerank_frequency=frequency, rerank_by="random")
        ranking = Ranking(TenantCounters(SchedulerConfig()), config)
        for index in range(100):
            assert ranking.standing(f"r{index}") == ranking.standing(f"r{index}")
            ranking.steps_done(1)
        assert len(ranking._ranks) <= 2


def test_the_tenant_served_less_displaces_the_one_served_more() -> None:
    for frequency, displaced in ((0.0, False), (0.1, True)):
        engine, _ = swapping_engine(swap=SwapConfig(rerank_frequency=frequency))
        engine.submit(replace(spec("greedy", prompt_len=20, max_tokens=40), tenant="g"), 0.0)
        step(engine)
        engine.submit(replace(spec("modest", prompt_len=45, max_tokens=10), tenant="m"), 1.0)
        preempted = [name for _ in range(35) for name in step(engine).preempted]
        assert bool(preempted) is displaced, frequency
        run_out(engine)


def test_higher_priority_displaces_and_lower_execution_priority_does_not() -> None:
    engine, _ = swapping_engine(swap=SwapConfig(rerank_frequency=1.0))
    engine.submit(spec("normal", prompt_len=40, max_tokens=20), 0.0)
    step(engine)
    engine.submit(spec("urgent", prompt_len=40, max_tokens=20, scheduling_priority=1), 1.0)
    step(engine)
    step(engine)
    assert running(engine) == {"urgent"}
    run_out(engine)
    engine.submit(spec("fast", prompt_len=40, max_tokens=20, execution_priority=1), 0.0)
    step(engine)
    engine.submit(spec("early", prompt_len=40, max_tokens=20, scheduling_priority=1), 1.0)
    step(engine)
    step(engine)
    assert running(engine) == {"fast"}


def test_a_swapped_out_request_that_moves_away_leaves_no_copy() -> None:
    engine, _ = swapping_engine()
    for index, name in enumerate("ab"):
        engine.submit(spec(name, prompt_len=15, max_tokens=40), float(index))
    while not step(engine).preempted:
        pass
    moved = engine.spec_of("b", 5.0)
    assert engine.take_out("b").swapped and len(moved.output_tokens) > 0
    engine.put_back("b", moved.epoch)
    assert [row.status for row in engine.rows("i", 0.0)] == [RequestStatus.RUNNING, RequestStatus.SWAPPED]
    engine.take_out("b")
    engine.release("b")
    engine.check()
    swap = engine.load().swap
    assert swap is not None and not engine.holds("b")
    run_out(engine)
