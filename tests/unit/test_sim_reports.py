"""What the simulator relies on and once found missing: news is reported at once, progress now and then."""

from itertools import count

import pytest
from engine_driving import small_engine, spec, step
from migration_driving import MANAGER, agent, sent_to

from llumnix.core.messages.load import LoadReport
from llumnix.core.messages.serving import FinishReason, Probe, Submit
from llumnix.instance.agent_reports import HEARTBEAT_S, PROGRESS_S
from llumnix.sim.tokens import sample


def test_a_first_token_is_news_and_the_next_ones_are_progress() -> None:
    engine = small_engine()
    one = agent("source", engine)
    one.start(1.0)
    one.handle(Submit(spec("r", max_tokens=12)), 1.0)
    (before,) = sent_to(one.tick(1.1), MANAGER)
    (after,) = sent_to(one.after_step(step(engine), 1.2), MANAGER)
    assert isinstance(before, LoadReport) and isinstance(after, LoadReport)
    assert (before.tokens_total, after.tokens_total) == (0, 1)
    assert not sent_to(one.after_step(step(engine), 1.3), MANAGER)
    until = one.quiet_until()
    assert until == 1.2 + PROGRESS_S
    engine.advance([0.01, 0.01], sample)
    (quiet,) = sent_to(one.after_quiet_steps([0.01, 0.01], {}, until), MANAGER)
    assert isinstance(quiet, LoadReport) and quiet.tokens_total == 4
    durations = [0.01] * engine.quiet(100).steps
    _, last = engine.advance(durations, sample)
    effects = one.after_quiet_steps(durations, last, until + 0.1)
    (ended,) = sent_to(effects, MANAGER)
    assert isinstance(ended, LoadReport) and ended.finished_total == 1
    ((delta,),) = [batch.deltas for batch in sent_to(effects, "tcp://frontend:1")]
    assert (delta.first_index, delta.finish_reason) == (11, FinishReason.LENGTH)


def test_how_long_the_head_of_the_queue_has_waited_is_told() -> None:
    engine = small_engine(kv_blocks=4, step_tokens_max=64)
    one = agent("source", engine)
    one.start(1.0)
    one.handle(Submit(spec("a", prompt_len=8, max_tokens=6)), 1.0)
    one.after_step(step(engine), 1.1)
    one.handle(Submit(spec("b", prompt_len=8, max_tokens=2, waited_s=7.0, scheduling_priority=3)), 2.0)
    (report,) = sent_to(one.after_step(step(engine), 2.5), MANAGER)
    assert isinstance(report, LoadReport)
    assert (report.waiting, report.head_missing_blocks, report.head_waited_s) == (1, 2, 7.5)
    assert (report.head_priority, report.head_arrived_at) == (3, -5.0)


def test_what_comes_ends_or_leaves_is_news_and_a_question_is_not() -> None:
    engine = small_engine()
    one = agent("source", engine)
    one.start(1.0)
    one.handle(Submit(spec("r", max_tokens=3)), 1.0)
    one.tick(1.0)
    for at in (1.1, 1.2):
        one.after_step(step(engine), at)
    one.handle(Probe("tcp://frontend:1", (("r", 0),)), 1.25)
    assert not sent_to(one.tick(1.3), MANAGER)
    (ended,) = sent_to(one.after_step(step(engine), 1.35), MANAGER)
    assert isinstance(ended, LoadReport) and ended.finished_total == 1


def test_progress_is_told_the_more_rarely_the_longer_free_blocks_last() -> None:
    due: list[float] = []
    for blocks in (8, 32, 4000):
        clock = count(0.0, 0.1)
        engine = small_engine(kv_blocks=blocks)
        one = agent("source", engine)
        one.start(1.0)
        one.handle(Submit(spec("r", max_tokens=12)), 1.0)
        one.tick(1.1)
        one.after_step(engine.step(lambda clock=clock: next(clock)), 1.2)
        until = one.quiet_until()
        assert until is not None
        due.append(until - 1.2)
    assert due[0] == pytest.approx(PROGRESS_S) and due[2] == pytest.approx(HEARTBEAT_S)
    assert due[0] < due[1] < due[2]
