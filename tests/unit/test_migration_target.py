"""The target's side of a migration, over a real engine: room is held and given back, and it decides once."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from engine_driving import run_out, small_engine, spec, undisturbed
from migration_driving import CONFIG, READ, STEP_S, agent, commit, messages, pace, reserve, stage

from llumnix.core.epochs import FIRST_EPOCH, HOP_MAX
from llumnix.core.errors import ProtocolError, TransportError
from llumnix.core.messages.migration import (
    AbortMigration,
    CommitSoon,
    Committed,
    Denied,
    QueryCommit,
    RefusalCode,
    Refused,
    Reserve,
    Reserved,
    StageCopied,
)
from llumnix.core.messages.serving import RequestSpec
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.migration.events import PeerFenced, ReadEnded, StartRead, StepEnded, Timeout
from llumnix.migration.target import ENDED, TRANSITIONS, TargetMigration, TargetState

REQUEST = spec("r", prompt_len=8, max_tokens=20)
OUTPUT = undisturbed(REQUEST)
QUERY = QueryCommit("m", "tcp://source:1")
FAILED = TransportError("cut")
EVENTS: list[object] = [
    reserve(REQUEST, 3),
    stage(2, (7,), 4),
    CommitSoon("m", 0.02),
    commit((7,), 9, OUTPUT[:2]),
    QUERY,
    AbortMigration("m", "changed my mind"),
    ReadEnded(1, READ),
    PeerFenced(),
    Timeout(),
]


def at(state: TargetState, engine: InProcessEngine | None = None) -> tuple[TargetMigration, InProcessEngine]:
    """A migration in one of its states that are not final; two full blocks are copied but for COPYING and the
    LETTING_GO that follows it."""
    engine = engine or small_engine()
    migration = TargetMigration(reserve(REQUEST, 3), engine=engine, config=CONFIG, pace=pace())
    migration.begin(1.0)
    migration.handle(stage(1, (4, 5), 3), 1.0)
    if state in (TargetState.RESERVED, TargetState.COMMITTING):
        migration.handle(ReadEnded(1, READ), 1.1)
    if state is TargetState.COMMITTING:
        migration.handle(commit((7,), 9, OUTPUT[:2]), 1.2)
    if state is TargetState.LETTING_GO:
        migration.handle(AbortMigration("m", ""), 1.2)
    assert migration.state is state
    return migration, engine


def reserved_blocks(engine: InProcessEngine) -> int:
    engine.check()
    return engine.load().reserved_blocks


def test_a_request_arrives_and_goes_on_where_it_was() -> None:
    engine = small_engine()
    migration = TargetMigration(reserve(REQUEST, 3), engine=engine, config=CONFIG, pace=pace())
    assert messages(migration.begin(1.0)) == [Reserved("m", CONFIG.reservation_s)]
    assert reserved_blocks(engine) == 3

    (read,) = migration.handle(stage(1, (4, 5), 4), 1.0)
    assert isinstance(read, StartRead)
    assert (read.stage, read.source_blocks, read.final) == (1, (4, 5), False)
    assert reserved_blocks(engine) == 4
    assert messages(migration.handle(ReadEnded(1, READ), 1.1)) == [StageCopied("m", 1, 0.25)]

    (last,) = migration.handle(commit((7,), 9, OUTPUT[:2]), 1.2)
    assert isinstance(last, StartRead)
    assert (last.source_blocks, last.final) == ((7,), True)
    assert not set(read.target_blocks) & set(last.target_blocks)
    assert messages(migration.handle(ReadEnded(2, READ), 1.3)) == [
        Committed("m", FIRST_EPOCH + 1, READ.duration_s)
    ]
    assert migration.ended
    adopted = engine.spec_of("r", 1.3)
    assert (adopted.epoch, adopted.output_tokens) == (FIRST_EPOCH + 1, OUTPUT[:2])
    assert reserved_blocks(engine) == 0
    run_out(engine)
    assert engine.output_since("r", 0).tokens == OUTPUT  # type: ignore[union-attr]


def test_a_waiting_request_is_taken_with_its_only_message() -> None:
    engine = small_engine()
    migration = TargetMigration(reserve(REQUEST, 0), engine=engine, config=CONFIG, pace=pace())
    assert messages(migration.begin(1.0)) == [Committed("m", FIRST_EPOCH + 1)]
    assert migration.ended
    assert engine.load().waiting == 1
    assert engine.spec_of("r", 1.0).epoch == FIRST_EPOCH + 1


def test_a_waiting_request_that_finds_a_full_queue_is_denied() -> None:
    engine = small_engine(waiting_max=1)
    engine.submit(spec("other"), 0.0)
    migration = TargetMigration(reserve(REQUEST, 0), engine=engine, config=CONFIG, pace=pace())
    (answer,) = messages(migration.begin(1.0))
    assert isinstance(answer, Denied)
    assert migration.ended
    assert not engine.holds("r")


def test_no_room_is_a_refusal_and_holds_nothing() -> None:
    engine = small_engine(kv_blocks=8)
    for blocks, stage_blocks in ((9, None), (3, 9)):
        migration = TargetMigration(reserve(REQUEST, blocks), engine=engine, config=CONFIG, pace=pace())
        effects = migration.begin(1.0)
        if stage_blocks is not None:
            effects = migration.handle(stage(1, (4, 5), stage_blocks), 1.0)
        (refused,) = messages(effects)
        assert isinstance(refused, Refused)
        assert refused.code is RefusalCode.NO_BLOCKS
        assert migration.ended
        assert reserved_blocks(engine) == 0


def test_a_commit_grows_the_reservation_or_is_denied() -> None:
    for kv_blocks, state in ((8, TargetState.COMMITTING), (4, TargetState.DENIED)):
        migration, _ = at(TargetState.RESERVED, small_engine(kv_blocks=kv_blocks))
        migration.handle(commit((7, 8, 9), 17, OUTPUT[:10]), 1.2)
        assert migration.state is state


@pytest.mark.parametrize("give_up", [lambda: AbortMigration("m", ""), PeerFenced, lambda: QUERY])
def test_blocks_are_kept_until_no_read_writes_to_them(give_up: Callable[[], object]) -> None:
    migration, engine = at(TargetState.COPYING)
    migration.handle(give_up(), 1.2)
    assert migration.state is TargetState.LETTING_GO
    assert reserved_blocks(engine) == 3
    migration.handle(ReadEnded(1, READ), 1.3)
    assert migration.ended
    assert reserved_blocks(engine) == 0
    assert not engine.has_work()


def test_asking_makes_an_undecided_target_deny_for_good() -> None:
    for state in (TargetState.RESERVED, TargetState.COPYING, TargetState.COMMITTING):
        migration, engine = at(state)
        (answer,) = messages(migration.handle(QUERY, 2.0))
        assert isinstance(answer, Denied)
        if not migration.ended:
            assert messages(migration.handle(QUERY, 2.1)) == [answer]
            assert messages(migration.handle(commit((7,), 9, OUTPUT[:2]), 2.1)) == [answer]
            migration.handle(ReadEnded(1, READ), 2.2)
        assert migration.answer == answer
        assert not engine.holds("r")


@pytest.mark.parametrize("state", [TargetState.COPYING, TargetState.COMMITTING])
def test_a_failed_read_is_a_refusal_that_says_so_and_a_denial_for_ever(state: TargetState) -> None:
    migration, engine = at(state)
    (answer,) = messages(migration.handle(ReadEnded(1, FAILED), 1.2))
    assert isinstance(answer, Refused) and answer.code is RefusalCode.UNREADABLE
    assert "cut" in answer.reason
    assert isinstance(migration.answer, Denied)
    assert reserved_blocks(engine) == 0


def test_a_refused_adoption_is_a_denial() -> None:
    migration, engine = at(TargetState.COMMITTING)
    engine.submit(replace(REQUEST, epoch=FIRST_EPOCH + 5), 1.0)
    (answer,) = messages(migration.handle(ReadEnded(2, READ), 1.2))
    assert isinstance(answer, Denied)
    assert engine.spec_of("r", 1.2).epoch == FIRST_EPOCH + 5


def test_a_fenced_source_whose_commit_has_come_still_hands_over() -> None:
    migration, engine = at(TargetState.COMMITTING)
    assert migration.handle(PeerFenced(), 1.2) == []
    migration.handle(ReadEnded(2, READ), 1.3)
    assert migration.state is TargetState.ADOPTED
    assert engine.holds("r")


def test_a_silent_source_loses_its_reservation() -> None:
    migration, engine = at(TargetState.RESERVED)
    assert migration.deadline == 1.1 + CONFIG.reservation_s
    (answer,) = messages(migration.handle(Timeout(), 20.0))
    assert isinstance(answer, Denied)
    assert migration.state is TargetState.EXPIRED
    assert reserved_blocks(engine) == 0


def test_a_long_copy_tells_its_source_that_it_is_alive() -> None:
    migration, _ = at(TargetState.COPYING)
    assert migration.deadline is not None
    assert migration.deadline - 1.0 < CONFIG.answer_timeout_s
    for now in (4.0, 7.0, 100.0):
        assert [type(m) for m in messages(migration.handle(Timeout(), now))] == [Reserved]
        assert migration.state is TargetState.COPYING


def test_a_source_hears_of_steps_that_have_left_their_rhythm_and_of_no_others() -> None:
    migration, engine = at(TargetState.RESERVED)
    assert engine.submit(spec("own"), 1.0) is None
    migration.handle(reserve(REQUEST, 3), 2.0)  # tells of a step at 2.0
    for late_s, told in ((0.0, 0), (0.001, 0), (0.01, 1), (0.01, 0)):
        effects = migration.handle(StepEnded(), 2.0 + 5 * STEP_S + late_s)
        assert len(messages(effects, Reserved)) == told


def test_a_stage_finds_room_for_all_of_its_blocks_whatever_it_says() -> None:
    migration, engine = at(TargetState.RESERVED)
    (read,) = migration.handle(stage(2, (6, 7, 8), 0), 1.2)
    assert isinstance(read, StartRead)
    assert len(read.target_blocks) == 3
    assert reserved_blocks(engine) == 5


def test_repeats_and_late_messages_change_nothing() -> None:
    migration, engine = at(TargetState.RESERVED)
    assert [type(m) for m in messages(migration.handle(reserve(REQUEST, 3), 1.2))] == [Reserved]
    (again,) = messages(migration.handle(stage(1, (4, 5), 3), 1.2))
    assert isinstance(again, StageCopied)
    assert migration.state is TargetState.RESERVED
    migration.handle(commit((7,), 9, OUTPUT[:2]), 1.3)
    for late in (stage(1, (4, 5), 3), CommitSoon("m", 0.1), commit((7,), 9, OUTPUT[:2]), reserve(REQUEST, 3)):
        assert migration.handle(late, 1.4) == []
    assert reserved_blocks(engine) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        stage(3, (7,), 4),
        stage(2, (), 4),
        commit((7,), 9, OUTPUT[:2], first_index=1),
        commit((7,), 12, OUTPUT[:2]),
        commit((), 9, OUTPUT[:2]),
        replace(commit((7,), 9, OUTPUT[:2]), epoch=FIRST_EPOCH),
        replace(commit((7,), 9, OUTPUT[:2]), epoch=FIRST_EPOCH + 2),
    ],
)
def test_what_cannot_be_meant_raises_and_changes_nothing(wrong: object) -> None:
    migration, engine = at(TargetState.RESERVED)
    with pytest.raises(ProtocolError, match="migration m of r from source"):
        migration.handle(wrong, 1.2)
    assert migration.state is TargetState.RESERVED
    assert reserved_blocks(engine) == 3
    migration.handle(commit((7,), 9, OUTPUT[:2]), 1.3)  # the right one is still welcome
    migration.handle(ReadEnded(2, READ), 1.4)
    assert isinstance(migration.answer, Committed)


@pytest.mark.parametrize(
    "wrong",
    [
        reserve(REQUEST, -1),
        replace(reserve(REQUEST, 3), full_blocks=-1),
        reserve(replace(REQUEST, epoch=FIRST_EPOCH | HOP_MAX), 0),
        reserve(replace(REQUEST, epoch=FIRST_EPOCH | HOP_MAX), 3),
        replace(reserve(REQUEST, 3), commit=commit((5, 6, 7), 9, OUTPUT[:2], first_index=1)),
        replace(reserve(REQUEST, 3), full_blocks=1, commit=commit((5, 6, 7), 9, OUTPUT[:2])),
    ],
)
def test_a_reserve_that_cannot_be_meant_is_a_fault_and_leaves_nothing_behind(wrong: Reserve) -> None:
    engine = small_engine()
    one = agent("target", engine)
    assert one.handle(wrong, 1.0) == []
    assert one.fault_count == 1
    assert "migration m of r from source" in one.faults[0]
    assert not one.migrating
    assert reserved_blocks(engine) == 0
    assert not engine.holds("r")
    assert messages(one.handle(reserve(REQUEST, 3), 1.1), Reserved)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", list(TRANSITIONS))
def test_every_pair_is_in_the_table_or_raises_with_the_story(state: TargetState, event: object) -> None:
    migration, engine = at(state)
    row = TRANSITIONS[state].get(type(event))
    if row is None:
        with pytest.raises(ProtocolError, match="migration m of r from source"):
            migration.handle(event, 2.0)
        assert migration.state is state
    else:
        migration.handle(event, 2.0)
        assert migration.state in row[1]
        if migration.ended:
            assert migration.answer is not None
            assert reserved_blocks(engine) == 0
    assert set(TRANSITIONS) == set(TargetState) - set(ENDED)


def test_the_request_adopted_is_the_one_reserved_and_what_was_generated_since() -> None:
    begun: RequestSpec = replace(REQUEST, output_tokens=OUTPUT[:3])
    engine = small_engine()
    migration = TargetMigration(reserve(begun, 3), engine=engine, config=CONFIG, pace=pace())
    migration.begin(1.0)
    migration.handle(commit((1, 2, 3), 12, OUTPUT[3:5], first_index=3), 1.0)
    migration.handle(ReadEnded(1, READ), 1.0)
    assert engine.spec_of("r", 1.0).output_tokens == OUTPUT[:5]
    assert engine.spec_of("r", 1.0).waited_s == 0.5
