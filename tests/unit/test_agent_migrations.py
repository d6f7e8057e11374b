"""Agents that move requests between them: what they do, refuse, remember, and when a target waits."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from agent_pair import Cluster
from engine_driving import FRONTEND, small_engine, spec, step, undisturbed
from migration_driving import CONFIG, MANAGER, READ, SOURCE, agent, order, reserve, sent_to

from llumnix.core.config import MigrationConfig
from llumnix.core.effects import Send
from llumnix.core.epochs import FIRST_EPOCH, HOP_MAX, RESUME_HOPS
from llumnix.core.errors import TransportError
from llumnix.core.messages.control import Fenced, InstanceHello, MigrationOutcome
from llumnix.core.messages.migration import (
    AbortMigration,
    Commit,
    CommitSoon,
    Committed,
    CopyStage,
    Denied,
    QueryCommit,
    RefusalCode,
    Refused,
    Reserve,
    Reserved,
)
from llumnix.core.messages.serving import Moved, Probe, ProbeReply, Submit
from llumnix.instance.agent import Agent, CloseReader
from llumnix.instance.agent_incoming import LAST_READ_HOLD_S, READER_IDLE_S
from llumnix.instance.in_process_engine import InProcessEngine


def test_a_whole_migration_between_two_agents() -> None:
    cluster = Cluster()
    request = spec("r", prompt_len=12, max_tokens=20)
    cluster.tell("source", Submit(request))
    cluster.steps("source", 5)
    cluster.tell("source", order())
    cluster.steps("source", 3)
    assert cluster.engines["target"].holds("r")
    assert not cluster.engines["source"].holds("r")
    assert Moved("r", FIRST_EPOCH + 1, "target") in cluster.heard[FRONTEND]
    (told,) = cluster.ended()
    assert (told.outcome, told.source_id, told.target_id) == (MigrationOutcome.COMMITTED, "source", "target")
    cluster.steps("target", 30)
    assert cluster.tokens("r") == undisturbed(request)


def test_a_copy_beside_computing_says_nothing_of_how_fast_the_target_reads() -> None:
    cluster = Cluster()
    cluster.tell("source", Submit(spec("r", prompt_len=20, max_tokens=20)))
    cluster.steps("source", 5)
    cluster.tell("source", order())
    cluster.steps("source", 3)
    assert cluster.ended()[0].stages == 2
    assert cluster.agents["source"]._outgoing._speeds.copy_s("target-1", 64, cluster.now) == 0.0


def test_no_more_is_reserved_than_a_request_can_come_to_need() -> None:
    one = agent("source", small_engine())
    one.handle(Submit(spec("r", prompt_len=6, max_tokens=2)), 1.0)
    one.after_step(step(one._engine), 1.0)  # type: ignore[arg-type]
    (asked,) = sent_to(one.handle(order(), 1.0), "tcp://target:1")
    assert isinstance(asked, Reserve)
    assert asked.blocks == 2  # of 4 tokens each; 7 tokens are known, and 8 is all there will be


def test_an_order_is_carried_out_once_and_a_bad_one_not_begun_with_its_reason() -> None:
    cluster = Cluster()
    cluster.deaf = {"target"}
    for request_id in ("r", "r2", "r3"):
        cluster.tell("source", Submit(spec(request_id)))
    cluster.tell("source", order())
    cluster.tell("source", order())
    assert cluster.ended() == []
    cluster.tell("source", Fenced("dead", "dead-1"))
    to_dead = replace(order("r2", "m1"), target_id="dead", target_incarnation="dead-1")
    to_itself = replace(order("r2", "m2"), target_id="source", target_incarnation="source-1")
    for bad in (to_dead, to_itself, order("r", "m3"), order("nobody", "m4"), to_itself):
        cluster.tell("source", bad)
    cluster.tell("source", order("r2", "m5"))
    cluster.tell("source", order("r3", "m6"))  # one too many
    reasons = {told.migration_id: told.reason for told in cluster.ended()}
    assert [told.migration_id for told in cluster.ended()] == ["m1", "m2", "m3", "m4", "m6"]
    for migration_id, word in (("m1", "ended"), ("m2", "same"), ("m3", "already"), ("m4", "not here")):
        assert word in reasons[migration_id]
    assert all(told.outcome is MigrationOutcome.ABORTED for told in cluster.ended()), "no target refused"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"target_incarnation": "target-0"}, RefusalCode.WRONG_TARGET),
        ({"spec": spec("r", max_tokens=1000)}, RefusalCode.TOO_LONG),
        ({"spec": spec("here")}, RefusalCode.DUPLICATE),
        ({"spec": spec("coming")}, RefusalCode.DUPLICATE),
        ({"kv_layout": replace(small_engine().executor.kv_layout, dtype="float16")}, RefusalCode.LAYOUT),
        ({"blocks": 1000}, RefusalCode.NO_BLOCKS),
    ],
)
def test_what_a_target_refuses(change: dict[str, object], code: RefusalCode) -> None:
    engine = small_engine()
    one = agent("target", engine)
    one.handle(Submit(spec("here")), 1.0)
    one.handle(reserve(spec("coming"), 1, migration_id="m0"), 1.0)
    asked = replace(reserve(spec("r"), 2), **change)  # type: ignore[arg-type]
    (refused,) = sent_to(one.handle(asked, 1.0), SOURCE)
    assert isinstance(refused, Refused)
    assert refused.code is code
    (answer,) = sent_to(one.handle(QueryCommit("m", SOURCE), 1.0), SOURCE)
    assert isinstance(answer, Denied)
    one.check()


def test_only_so_many_come_in_at_once() -> None:
    one = agent("target", small_engine())
    answers = [
        sent_to(one.handle(reserve(spec(f"r{n}"), 1, migration_id=f"m{n}"), 1.0), SOURCE)[0] for n in range(3)
    ]
    assert [type(answer) for answer in answers] == [Reserved, Reserved, Refused]


def test_a_pool_of_another_size_is_no_other_layout() -> None:
    one = agent("target", small_engine())
    (answer,) = sent_to(one.handle(reserve(spec("r"), 2, engine=small_engine(kv_blocks=99)), 1.0), SOURCE)
    assert isinstance(answer, Reserved)


def test_what_was_denied_once_stays_denied() -> None:
    engine = small_engine()
    one = agent("target", engine)
    (first,) = sent_to(one.handle(QueryCommit("m", SOURCE), 1.0), SOURCE)
    assert isinstance(first, Denied)
    assert not sent_to(one.handle(reserve(spec("r"), 0), 1.1), SOURCE)  # late
    assert sent_to(one.handle(Commit("m", FIRST_EPOCH + 1, (), 0, 0, (), 0.0), 1.2), SOURCE) == [first]
    assert sent_to(one.handle(QueryCommit("m", SOURCE), 1.3), SOURCE) == [first]
    assert not engine.holds("r")


def test_a_commit_from_nowhere_is_denied_when_asked_about() -> None:
    one = agent("target", small_engine())
    assert not one.handle(Commit("m", FIRST_EPOCH + 1, (), 0, 0, (), 0.0), 1.0)
    (answer,) = sent_to(one.handle(QueryCommit("m", SOURCE), 1.1), SOURCE)
    assert isinstance(answer, Denied)


def test_every_repeat_of_the_question_gets_the_same_yes() -> None:
    cluster = Cluster()
    request = spec("r", max_tokens=3)
    cluster.tell("source", Submit(request))
    cluster.tell("source", order())
    cluster.steps("target", 5)
    assert not cluster.engines["target"].holds("r")  # it has long finished there
    one = cluster.agents["target"]
    for _ in range(3):
        assert sent_to(one.handle(QueryCommit("m", SOURCE), 9.0), SOURCE) == [Committed("m", FIRST_EPOCH + 1)]


def test_who_left_is_said_to_have_moved_until_its_new_owner_dies() -> None:
    cluster = Cluster()
    cluster.tell("source", Submit(spec("r")))
    cluster.tell("source", order())
    source = cluster.agents["source"]
    moved, reply = sent_to(source.handle(Probe(FRONTEND, (("r", 0),)), 2.0), FRONTEND)
    assert moved == Moved("r", FIRST_EPOCH + 1, "target")
    assert reply == ProbeReply("source", ("r",))
    source.handle(Fenced("target", "target-0"), 2.5)  # its predecessor
    assert moved in sent_to(source.handle(Probe(FRONTEND, (("r", 0),)), 2.5), FRONTEND)
    source.handle(Fenced("target", "target-1"), 3.0)
    assert sent_to(source.handle(Probe(FRONTEND, (("r", 0),)), 4.0), FRONTEND) == [
        ProbeReply("source", ("r",))
    ]


def test_a_request_that_comes_back_is_here() -> None:
    cluster = Cluster()
    cluster.tell("source", Submit(spec("r", max_tokens=20)))
    cluster.tell("source", order())
    cluster.steps("target", 2)
    back = replace(order("r", "m2"), target_id="source", target_incarnation="source-1", target_address=SOURCE)
    cluster.tell("target", back)
    cluster.steps("target", 2)
    assert cluster.engines["source"].holds("r")
    answers = sent_to(cluster.agents["source"].handle(Probe(FRONTEND, (("r", 0),)), 9.0), FRONTEND)
    assert not [message for message in answers if isinstance(message, Moved)]


def test_an_undecided_request_counts_as_held_until_its_target_has_been_silent_too_long() -> None:
    cluster = Cluster()
    cluster.tell("source", Submit(spec("r", max_tokens=20)))
    cluster.steps("source", 3)
    cluster.lost = {Commit}
    cluster.tell("source", order())
    cluster.steps("source", 2)
    source = cluster.agents["source"]
    assert not cluster.engines["source"].has_work()
    reply, _ = sent_to(source.handle(Probe(FRONTEND, (("r", 0),)), 2.0), FRONTEND)
    assert reply == ProbeReply("source", ())

    asked = source.tick(2.0 + CONFIG.answer_timeout_s)
    assert QueryCommit("m", SOURCE) in [e.message for e in asked if isinstance(e, Send)]
    reply, *_ = sent_to(source.handle(Probe(FRONTEND, (("r", 0),)), 8.0), FRONTEND)
    assert reply == ProbeReply("source", ("r",)), "its frontend is free to continue it elsewhere"
    source.handle(Fenced("target", "target-1"), 9.0)
    source.check()
    assert cluster.engines["source"].spec_of("r", 9.0).epoch == FIRST_EPOCH + RESUME_HOPS


def test_a_source_that_resumes_shares_no_epoch_with_whom_the_dead_target_moved_the_request_to() -> None:
    cluster = Cluster(names=("source", "target", "third"))
    cluster.tell("source", Submit(spec("r", prompt_len=12, max_tokens=30)))
    cluster.steps("source", 5)
    cluster.lost = {Committed}
    cluster.tell("source", order())
    cluster.steps("source", 3)
    cluster.lost, cluster.deaf = set(), {"source"}
    onward = replace(order("r", "m2"), target_id="third", target_incarnation="third-1")
    cluster.tell("target", replace(onward, target_address="tcp://third:1"))
    cluster.steps("target", 4)
    cluster.tell("source", Fenced("target", "target-1"))
    third, source = (cluster.engines[name].spec_of("r", 9.0).epoch for name in ("third", "source"))
    assert third == FIRST_EPOCH + 2
    assert source == FIRST_EPOCH + RESUME_HOPS


def test_a_request_without_hops_enough_left_to_resume_does_not_leave() -> None:
    for hop, moves in ((HOP_MAX - RESUME_HOPS, True), (HOP_MAX - RESUME_HOPS + 1, False)):
        cluster = Cluster()
        cluster.deaf = {"target"}
        cluster.tell("source", Submit(spec("r", max_tokens=20, epoch=FIRST_EPOCH + hop)))
        cluster.tell("source", order())
        assert cluster.agents["source"].migrating is moves
        assert moves or "too often" in cluster.ended()[0].reason
        cluster.tell("source", Fenced("target", "target-1"))


def test_a_submit_of_the_next_generation_replaces_what_is_being_moved() -> None:
    cluster = Cluster()
    cluster.tell("source", Submit(spec("r", max_tokens=20)))
    cluster.steps("source", 3)
    cluster.lost = {Commit}
    cluster.tell("source", order())
    cluster.steps("source", 2)
    newer = spec("r", max_tokens=20, epoch=2 * FIRST_EPOCH)
    cluster.tell("source", Submit(newer))
    cluster.steps("source", 30)
    assert cluster.ended()[-1].outcome is MigrationOutcome.ABORTED
    cluster.engines["source"].check()
    assert cluster.engines["source"].output_since("r", 0).tokens == undisturbed(newer)  # type: ignore[union-attr]


def test_a_fenced_source_loses_its_reservations_at_once() -> None:
    engine = small_engine()
    one = agent("target", engine)
    one.handle(reserve(spec("r"), 3), 1.0)
    one.handle(Fenced("source", "source-0"), 1.1)
    assert engine.load().reserved_blocks == 3
    one.handle(Fenced("source", "source-1"), 1.2)
    assert engine.load().reserved_blocks == 0


def test_a_pool_nobody_reads_from_is_closed_after_a_while() -> None:
    one = agent("target", small_engine())
    one.handle(reserve(spec("r"), 3), 1.0)
    one.handle(AbortMigration("m", ""), 2.0)
    assert closed(one.tick(2.0 + READER_IDLE_S / 2)) == []
    assert closed(one.tick(3.0 + READER_IDLE_S)) == ["pool-of-source"]
    assert closed(one.tick(4.0 + 2 * READER_IDLE_S)) == []


def closed(effects: Sequence[object]) -> list[str]:
    return [effect.pool_name for effect in effects if isinstance(effect, CloseReader)]


def test_the_pool_of_a_process_that_has_ended_is_closed_at_once() -> None:
    one = agent("target", small_engine())
    one.handle(reserve(spec("r"), 3), 1.0)
    one.handle(AbortMigration("m", ""), 1.1)
    one.handle(Fenced("source", "source-0"), 1.2)
    assert closed(one.tick(1.2)) == []
    one.handle(Fenced("source", "source-1"), 1.3)
    assert closed(one.tick(1.3)) == ["pool-of-source"]
    assert closed(one.tick(1.4)) == []


def test_the_last_blocks_are_read_to_their_end_before_the_pool_of_a_dead_process_is_closed() -> None:
    held = HeldTarget()
    one = held.agent
    one.handle(Commit("m", FIRST_EPOCH + 1, (5,), 3, 0, (7,), 0.0), 1.0)
    one.handle(Fenced("source", "source-1"), 1.1)
    assert closed(one.tick(1.1)) == []
    one.read_ended("m", 1, READ, 1.2)
    assert closed(one.tick(1.2)) == ["pool-of-source"]
    assert held.engine.holds("r")


def test_a_failed_read_leaves_the_request_where_it_was() -> None:
    cluster = Cluster()
    cluster.tell("source", Submit(spec("r", prompt_len=12, max_tokens=20)))
    cluster.steps("source", 3)
    cluster.deaf = {"target"}
    cluster.tell("source", order())
    cluster.deaf = {"source"}
    target = cluster.agents["target"]
    target.handle(reserve(cluster.engines["source"].spec_of("r", 1.0), 4), 1.0)
    target.handle(CopyStage("m", 1, (0, 1, 2), 5), 1.0)
    (denied,) = sent_to(target.read_ended("m", 1, TransportError("cut"), 1.1), SOURCE)
    cluster.tell("source", Reserved("m", 15.0))
    cluster.tell("source", denied)
    assert cluster.ended()[0].outcome is MigrationOutcome.ABORTED
    assert cluster.engines["source"].has_work()
    assert cluster.engines["target"].load().reserved_blocks == 0


def test_hello_and_reserve_speak_of_the_same_process() -> None:
    engine = small_engine()
    one = agent("source", engine)
    (told, _) = sent_to(one.start(1.0), MANAGER)
    one.handle(Submit(spec("r")), 1.0)
    (asked,) = sent_to(one.handle(order(), 1.0), "tcp://target:1")
    assert isinstance(told, InstanceHello)
    assert isinstance(asked, Reserve)
    assert (asked.source_incarnation, asked.kv_endpoint) == (told.incarnation, told.kv_endpoint)


class HeldTarget:
    """A target in the middle of its own work, with a step of 20 ms behind it."""

    def __init__(self, config: MigrationConfig = CONFIG) -> None:
        self.engine: InProcessEngine = small_engine()
        self.agent: Agent = agent("target", self.engine, config)
        self.agent.handle(Submit(spec("own", max_tokens=20)), 1.0)
        self.agent.after_step(step(self.engine)._replace(duration_s=0.02), 1.0)
        self.agent.handle(reserve(spec("r", prompt_len=3), 2), 1.0)


def test_a_target_holds_its_step_for_a_commit_that_is_near() -> None:
    target = HeldTarget().agent
    target.handle(CommitSoon("m", 0.02), 1.018, arrived_at=1.005)
    until = target.hold_until(1.018)
    assert until is not None
    assert until == pytest.approx(1.018 + 0.5 * 0.02)
    assert target.hold_until(until) is None  # once, and no longer
    assert target.hold_until(until + 0.001) is None


def test_a_target_does_not_hold_for_a_commit_that_is_far() -> None:
    target = HeldTarget().agent
    target.handle(CommitSoon("m", 0.02), 1.006, arrived_at=1.005)
    assert target.hold_until(1.006) is None
    assert HeldTarget().agent.hold_until(1.0) is None


def test_a_hold_ends_with_the_migration() -> None:
    held = HeldTarget()
    held.agent.handle(CommitSoon("m", 0.001), 1.0)
    assert held.agent.hold_until(1.0) is not None
    held.agent.handle(Commit("m", FIRST_EPOCH + 1, (5,), 3, 0, (7,), 0.0), 1.002)
    assert held.agent.hold_until(1.002) is not None  # for the last blocks
    held.agent.read_ended("m", 1, READ, 1.003)
    assert held.agent.hold_until(1.003) is None
    assert held.engine.holds("r")


def test_a_step_waits_for_the_last_blocks_but_not_for_a_read_that_gets_nowhere() -> None:
    target = HeldTarget().agent
    target.handle(CommitSoon("m", 0.001), 1.0)
    assert target.hold_until(1.0) is not None
    assert target.hold_until(1.011) is None  # the commit is late: a step goes first
    target.handle(Commit("m", FIRST_EPOCH + 1, (5,), 3, 0, (7,), 0.0), 1.05)
    until = target.hold_until(1.05)
    assert until == pytest.approx(1.05 + LAST_READ_HOLD_S)
    assert target.hold_until(1.06) == until
    assert target.hold_until(1.071) is None
    assert target.hold_until(1.09) is None  # nor do the steps after


def test_holding_can_be_turned_off() -> None:
    target = HeldTarget(replace(CONFIG, hold_share=0.0)).agent
    target.handle(CommitSoon("m", 0.001), 1.0)
    assert target.hold_until(1.0) is None
