"""The agent over a real engine: what it says to frontends and the manager, and what it makes of mistakes."""

from dataclasses import replace

import pytest
from agent_pair import Cluster
from engine_driving import FRONTEND, small_engine, spec, step, undisturbed
from migration_driving import MANAGER, SOURCE, agent, hello, order, reserve, sent_to

from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.messages.control import (
    HelloWanted,
    ListRequests,
    Placed,
    RequestList,
    RequestStatus,
    SchedulerSettings,
    SetDraining,
)
from llumnix.core.messages.load import LoadReport
from llumnix.core.messages.migration import CommitSoon, Committed, CopyStage, RefusalCode, Refused, Reserved
from llumnix.core.messages.serving import (
    Abort,
    Probe,
    ProbeReply,
    RejectCode,
    Rejected,
    Submit,
    TokenBatch,
    TokenDelta,
)


def test_it_introduces_itself_at_the_start_and_when_asked() -> None:
    engine = small_engine()
    one = agent("source", engine)
    for effects in (one.start(1.0), one.handle(HelloWanted(), 2.0)):
        told = sent_to(effects, MANAGER)
        assert told[0] == hello("source", engine)
        assert isinstance(told[1], LoadReport)


def test_tokens_go_to_each_frontend_once_a_step() -> None:
    engine = small_engine()
    one = agent("source", engine)
    for request_id, frontend in (("r1", "tcp://f1:1"), ("r2", "tcp://f2:1"), ("r3", "tcp://f2:1")):
        one.handle(Submit(spec(request_id, frontend=frontend)), 1.0)
    step(engine)
    effects = one.after_step(step(engine), 1.1)
    (first,), (second,) = sent_to(effects, "tcp://f1:1"), sent_to(effects, "tcp://f2:1")
    assert isinstance(first, TokenBatch)
    assert isinstance(second, TokenBatch)
    assert [delta.request_id for delta in first.deltas] == ["r1"]
    assert {delta.request_id for delta in second.deltas} >= {"r2"}


def test_what_the_engine_refuses_is_rejected() -> None:
    one = agent("source", small_engine(waiting_max=1))
    (rejected,) = sent_to(one.handle(Submit(spec("r", prompt_len=900)), 1.0), FRONTEND)
    assert isinstance(rejected, Rejected)
    assert (rejected.request_id, rejected.code) == ("r", RejectCode.INVALID)
    one.handle(Submit(spec("r1")), 1.0)
    (rejected,) = sent_to(one.handle(Submit(spec("r2")), 1.0), FRONTEND)
    assert isinstance(rejected, Rejected)
    assert rejected.code is RejectCode.QUEUE_FULL


def test_a_submit_said_twice_is_taken_once_and_not_rejected() -> None:
    engine = small_engine()
    one = agent("source", engine)
    for _ in range(2):
        assert not sent_to(one.handle(Submit(spec("r")), 1.0), FRONTEND)
    assert engine.load().waiting == 1
    one.handle(Abort("r", FIRST_EPOCH), 1.1)
    one.handle(Submit(spec("r")), 1.2)
    assert engine.load().waiting == 0


def test_only_newer_settings_hold() -> None:
    engine = small_engine()
    one = agent("source", engine)
    for revision, weight in ((2, "9.0"), (2, "5.0"), (1, "7.0")):
        one.handle(SchedulerSettings(revision, (("tenant_output_weight", weight),)), 1.0)
    told = sent_to(one.handle(HelloWanted(), 2.0), MANAGER)
    assert told[1] == SchedulerSettings(2, (("tenant_output_weight", "9.0"),))
    one.handle(Submit(replace(spec("r", prompt_len=3), tenant="t")), 3.0)
    step(engine)
    (account,) = engine.load().tenants
    assert account.served_total == 3 * 1.0 + 9.0


def test_what_lies_before_the_first_token_is_not_told() -> None:
    engine = small_engine()
    one = agent("source", engine)
    request = spec("r", max_tokens=4)
    one.handle(Submit(request), 1.0)
    step(engine)
    _, batch = sent_to(one.handle(Probe(FRONTEND, (("r", -2),)), 2.0), FRONTEND)
    assert isinstance(batch, TokenBatch)
    assert batch.deltas == (TokenDelta("r", FIRST_EPOCH, 0, undisturbed(request)[:1]),)


def test_draining_refuses_new_requests_and_migrations_until_told_otherwise() -> None:
    engine = small_engine()
    one = agent("target", engine)
    (report,) = sent_to(one.handle(SetDraining(True), 1.0), MANAGER)
    assert isinstance(report, LoadReport)
    assert report.draining
    (rejected,) = sent_to(one.handle(Submit(spec("r")), 1.0), FRONTEND)
    assert isinstance(rejected, Rejected)
    assert rejected.code is RejectCode.DRAINING
    (refused,) = sent_to(one.handle(reserve(spec("r2"), 1), 1.0), SOURCE)
    assert isinstance(refused, Refused)
    assert refused.code is RefusalCode.DRAINING
    one.handle(SetDraining(False), 1.1)
    assert not sent_to(one.handle(Submit(spec("r")), 1.2), FRONTEND)


def test_a_probe_tells_unknown_requests_and_missing_tokens() -> None:
    engine = small_engine()
    one = agent("source", engine)
    request = spec("r", max_tokens=4)
    one.handle(Submit(request), 1.0)
    one.handle(Submit(spec("w")), 1.0)
    for _ in range(3):
        one.after_step(step(engine), 1.0)
    reply, batch = sent_to(one.handle(Probe(FRONTEND, (("r", 1), ("gone", 0), ("w", 9))), 2.0), FRONTEND)
    assert reply == ProbeReply("source", ("gone",))
    assert isinstance(batch, TokenBatch)
    assert batch.deltas == (TokenDelta("r", FIRST_EPOCH, 1, undisturbed(request)[1:3]),)
    one.after_step(step(engine), 2.1)  # it ends; its last words can still be asked for
    _, batch = sent_to(one.handle(Probe(FRONTEND, (("r", 4),)), 2.2), FRONTEND)
    assert isinstance(batch, TokenBatch)
    assert batch.deltas[0].finish_reason is not None


def test_reports_come_on_change_at_a_bounded_rate_and_as_a_heartbeat() -> None:
    engine = small_engine()
    one = agent("source", engine)
    (_, first) = sent_to(one.start(1.0), MANAGER)
    assert one.tick(1.5) == []
    one.handle(Submit(spec("r1")), 1.501)
    assert one.tick(1.502) == []  # what the next step makes of it is told with it
    assert one.next_deadline() == pytest.approx(1.511)
    (second,) = sent_to(one.after_step(step(engine), 1.505), MANAGER)
    one.handle(Submit(spec("r2")), 1.506)
    one.handle(Submit(spec("r3")), 1.509)
    assert one.next_deadline() == pytest.approx(1.516)
    (third,) = sent_to(one.tick(1.516), MANAGER)
    assert one.next_deadline() == pytest.approx(2.516)
    assert one.tick(2.515) == []
    (fourth,) = sent_to(one.tick(2.517), MANAGER)
    reports = [message for message in (first, second, third, fourth) if isinstance(message, LoadReport)]
    assert [report.sequence for report in reports] == [1, 2, 3, 4]
    assert [report.accepted for report in reports] == [(), ("r1",), ("r2", "r3"), ()]
    assert reports[1].tokens_total == 1 and reports[2].waiting == 2


def test_a_listing_shows_what_is_on_the_move() -> None:
    cluster = Cluster()
    cluster.deaf = {"target"}
    for request_id in ("r", "still"):
        cluster.tell("source", Submit(spec(request_id)))
    cluster.steps("source", 2)
    cluster.tell("source", order())
    (listing,) = sent_to(
        cluster.agents["source"].handle(ListRequests("q", "tcp://asker:1"), 1.0), "tcp://asker:1"
    )
    assert isinstance(listing, RequestList)
    states = {row.request_id: row.status for row in listing.rows}
    assert states["r"] is RequestStatus.MIGRATING
    assert states["still"] is not RequestStatus.MIGRATING


def test_requests_of_a_lost_frontend_are_dropped_and_no_others() -> None:
    engine = small_engine()
    one = agent("source", engine)
    one.handle(Submit(spec("r")), 1.0)
    other = replace(spec("o"), frontend_address="tcp://other")
    one.handle(Submit(other), 1.0)
    assert one.frontend_lost("tcp://stranger", 1.5) == []
    one.frontend_lost(FRONTEND, 2.0)
    assert not engine.holds("r")
    assert engine.holds("o")


@pytest.mark.parametrize(
    "wrong",
    [
        Placed("r", "i", "a"),
        CommitSoon("nobody", 1.0),
        Committed("m", FIRST_EPOCH + 9),
        CopyStage("in", 7, (1,), 2),
        "no message at all",
    ],
)
def test_a_peers_mistake_is_counted_and_changes_nothing(wrong: object) -> None:
    engine = small_engine()
    one = agent("source", engine)
    one.handle(Submit(spec("r", max_tokens=20)), 1.0)
    one.handle(order(), 1.0)
    one.handle(Reserved("m", 15.0), 1.0)
    coming = replace(reserve(spec("x"), 1, migration_id="in"), target_incarnation="source-1")
    one.handle(coming, 1.0)
    before = engine.load()
    assert one.handle(wrong, 1.1) == []
    assert engine.load() == before
    harmless = isinstance(wrong, CommitSoon)
    assert one.fault_count == (0 if harmless else 1)
    assert len(one.faults) == one.fault_count
