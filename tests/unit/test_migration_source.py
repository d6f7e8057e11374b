"""The source's side of a migration, over a real engine: what it sends, when it gives up and may resume."""

from dataclasses import replace

import pytest
from engine_driving import run_out, small_engine, spec, step
from migration_driving import CONFIG, MANAGER, STEP_S, TARGET, begun, messages, running, sent_to

from llumnix.core.config import EngineConfig
from llumnix.core.effects import Send
from llumnix.core.epochs import FIRST_EPOCH, HOP_MAX, RESUME_HOPS
from llumnix.core.errors import ProtocolError
from llumnix.core.messages.control import MigrationEnded, MigrationOutcome
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
    StageCopied,
)
from llumnix.core.messages.serving import Abort, Moved
from llumnix.instance.engine import MovableState
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.simulated_executor import SimulatedExecutor
from llumnix.migration.events import ClientAbort, PeerFenced, StepEnded, Superseded, Timeout
from llumnix.migration.source import TRANSITIONS, SourceMigration
from llumnix.migration.source_commit import ASKS_MAX
from llumnix.migration.source_state import ENDED, SourceState

RESERVED = Reserved("m", 15.0)
COMMITTED = Committed("m", FIRST_EPOCH + 1)
EVENTS: list[object] = [
    RESERVED,
    Refused("m", RefusalCode.NO_BLOCKS, "full"),
    StageCopied("m", 1, 0.1),
    COMMITTED,
    Denied("m", "no"),
    StepEnded(),
    ClientAbort(FIRST_EPOCH),
    Superseded(),
    PeerFenced(),
    Timeout(),
]


def at(state: SourceState) -> tuple[SourceMigration, InProcessEngine]:
    """A migration in one of its states that are not final, of a request with 18 tokens in 4 full blocks."""
    engine = small_engine()
    running(engine, prompt_len=16, steps=4)
    migration, _ = begun(engine)
    if state is not SourceState.RESERVING:
        migration.handle(RESERVED, 1.0)
    if state not in (SourceState.RESERVING, SourceState.COPYING):
        migration.handle(StageCopied("m", 1, 0.1), 1.1)
    if state in (SourceState.COMMITTING, SourceState.COMMIT_UNKNOWN):
        step(engine)
        migration.handle(StepEnded(), 1.2)
    if state is SourceState.COMMIT_UNKNOWN:
        migration.handle(Timeout(), 7.0)
    assert migration.state is state
    return migration, engine


def ended(effects: list[Send]) -> MigrationEnded:
    """What the manager is told."""
    (message,) = sent_to(effects, MANAGER)
    assert isinstance(message, MigrationEnded)
    return message


def test_a_running_request_goes_over_in_stages_and_then_by_commit() -> None:
    engine = small_engine()
    request = running(engine, prompt_len=16, steps=4)
    migration, effects = begun(engine)
    (ask,) = messages(effects)
    assert isinstance(ask, Reserve)
    assert ask.spec.output_tokens == tuple(engine.output_since("r", 0).tokens)  # type: ignore[union-attr]
    assert ask.blocks == 6  # 18 tokens known, and a block's worth of what the first stage will add

    (first,) = messages(migration.handle(RESERVED, 1.0))
    blocks = engine.movable("r").blocks  # type: ignore[union-attr]
    assert isinstance(first, CopyStage)
    assert (first.stage, first.source_blocks) == (1, blocks[:4])

    for _ in range(9):
        step(engine)
        assert migration.handle(StepEnded(), 1.1) == []
    (second,) = messages(migration.handle(StageCopied("m", 1, 0.1), 1.2))
    blocks = engine.movable("r").blocks  # type: ignore[union-attr]
    assert isinstance(second, CopyStage)
    assert (second.stage, second.source_blocks) == (2, blocks[4:6])
    assert second.reserve_blocks >= len(blocks)

    step(engine)
    migration.handle(StepEnded(), 1.3)
    assert messages(migration.handle(StageCopied("m", 2, 0.1), 1.4)) == [CommitSoon("m", STEP_S)]
    step(engine)
    (commit,) = messages(migration.handle(StepEnded(), 1.5))
    known = engine.spec_of("r", 1.5)
    assert isinstance(commit, Commit)
    assert commit.epoch == request.epoch + 1
    assert commit.first_index == len(ask.spec.output_tokens)
    assert ask.spec.output_tokens + commit.output_tokens == known.output_tokens
    assert commit.computed_tokens == len(known.prompt_tokens) + len(known.output_tokens) - 1
    assert len(first.source_blocks + second.source_blocks + commit.source_blocks) == -(
        -commit.computed_tokens // 4
    )
    assert not engine.has_work()  # nobody decodes it here any more

    effects = migration.handle(COMMITTED, 1.75)
    assert messages(effects, Moved) == [Moved("r", FIRST_EPOCH + 1, "target")]
    assert not engine.holds("r")
    told = ended(effects)
    assert (told.outcome, told.stages) == (MigrationOutcome.COMMITTED, 3)
    assert told.pause_s == pytest.approx(0.25)
    assert told.kv_bytes == 8 * engine.executor.kv_layout.block_bytes
    engine.check()


def waiting() -> tuple[SourceMigration, InProcessEngine]:
    engine = small_engine()
    engine.submit(spec("r"), 0.0)
    migration, effects = begun(engine)
    (message,) = messages(effects)
    assert isinstance(message, Reserve)
    assert message.blocks == 0
    return migration, engine


def test_a_waiting_request_leaves_with_its_only_message() -> None:
    migration, engine = waiting()
    assert migration.undecided
    assert not engine.has_work()
    effects = migration.handle(COMMITTED, 1.0)
    assert messages(effects, Moved) == [Moved("r", FIRST_EPOCH + 1, "target")]
    assert not engine.holds("r")
    told = ended(effects)
    assert (told.outcome, told.stages, told.kv_bytes) == (MigrationOutcome.COMMITTED, 1, 0)


@pytest.mark.parametrize(
    ("answer", "outcome", "epoch"),
    [
        (Refused("m", RefusalCode.DRAINING, "no"), MigrationOutcome.REFUSED, FIRST_EPOCH),
        (Denied("m", "its queue is full"), MigrationOutcome.ABORTED, FIRST_EPOCH),
        (PeerFenced(), MigrationOutcome.RESUMED, FIRST_EPOCH + RESUME_HOPS),
    ],
)
def test_a_waiting_request_that_is_not_taken_goes_on_waiting(
    answer: object, outcome: MigrationOutcome, epoch: int
) -> None:
    migration, engine = waiting()
    assert ended(migration.handle(answer, 1.0)).outcome is outcome
    assert engine.load().waiting == 1
    assert engine.spec_of("r", 2.0).epoch == epoch


def test_a_target_that_never_answers_is_given_up_and_the_request_left_to_its_frontend() -> None:
    migration, engine = at(SourceState.COMMITTING)
    effects = []
    for ask in range(ASKS_MAX + 1):
        assert not migration.ended
        effects = migration.handle(Timeout(), 7.0 + ask)
    assert ended(effects).outcome is MigrationOutcome.ABORTED
    assert messages(effects, AbortMigration)  # should it be late and undecided still
    assert not engine.holds("r")
    engine.check()


def test_silence_about_a_waiting_request_is_no_answer() -> None:
    migration, engine = waiting()
    (ask,) = messages(migration.handle(Timeout(), 6.0))
    assert isinstance(ask, QueryCommit)
    assert migration.state is SourceState.COMMIT_UNKNOWN
    assert not engine.has_work()


def test_a_short_request_needs_no_stage() -> None:
    engine = small_engine()
    running(engine, prompt_len=5, steps=2)
    migration, _ = begun(engine)
    assert messages(migration.handle(RESERVED, 1.0)) == [CommitSoon("m", STEP_S)]


def test_without_a_hold_the_commit_is_not_announced() -> None:
    engine = small_engine()
    running(engine, prompt_len=5, steps=2)
    migration, _ = begun(engine, replace(CONFIG, hold_share=0.0))
    assert isinstance(messages(migration.handle(RESERVED, 1.0))[0], Commit)


def test_after_the_last_stage_allowed_the_rest_goes_with_the_commit() -> None:
    engine = small_engine()
    running(engine, prompt_len=16, steps=4)
    migration, _ = begun(engine, replace(CONFIG, stages_max=1, hold_share=0.0))
    migration.handle(RESERVED, 1.0)
    for _ in range(10):
        step(engine)
    (commit,) = messages(migration.handle(StageCopied("m", 1, 0.1), 1.2))
    assert isinstance(commit, Commit)
    assert len(commit.source_blocks) == 3


@pytest.mark.parametrize("state", [SourceState.RESERVING, SourceState.COPYING, SourceState.READY])
def test_before_the_commit_the_end_of_the_request_ends_the_migration(state: SourceState) -> None:
    migration, engine = at(state)
    run_out(engine)
    effects = migration.handle(StepEnded(), 2.0)
    assert messages(effects, AbortMigration)
    assert ended(effects).outcome is MigrationOutcome.ABORTED


@pytest.mark.parametrize("state", [SourceState.RESERVING, SourceState.COPYING, SourceState.READY])
def test_a_preempted_request_stays(state: SourceState) -> None:
    migration, engine = at(state)
    engine.take_out("r")
    engine.put_back("r", FIRST_EPOCH)
    engine.submit(spec("vip", prompt_len=3, max_tokens=60, execution_priority=1), 0.0)
    for _ in range(50):
        if step(engine).preempted:
            break
    effects = migration.handle(StepEnded(), 2.0)
    assert messages(effects, AbortMigration)
    assert "preempted" in ended(effects).reason
    assert engine.holds("r")


@pytest.mark.parametrize("state", [SourceState.RESERVING, SourceState.COPYING, SourceState.READY])
@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        (Timeout(), MigrationOutcome.ABORTED),
        (PeerFenced(), MigrationOutcome.ABORTED),
        (Denied("m", "copying failed"), MigrationOutcome.ABORTED),
        (Refused("m", RefusalCode.NO_BLOCKS, "full"), MigrationOutcome.REFUSED),
    ],
)
def test_a_target_that_fails_before_the_commit_changes_nothing(
    state: SourceState, event: object, outcome: MigrationOutcome
) -> None:
    migration, engine = at(state)
    told = ended(migration.handle(event, 9.0))
    assert told.outcome is outcome
    assert told.pause_s == 0.0
    assert engine.has_work()
    assert engine.spec_of("r", 9.0).epoch == FIRST_EPOCH


@pytest.mark.parametrize("state", [SourceState.COMMITTING, SourceState.COMMIT_UNKNOWN])
def test_after_a_denial_it_goes_on_at_its_own_epoch(state: SourceState) -> None:
    migration, engine = at(state)
    assert ended(migration.handle(Denied("m", "no room"), 9.0)).outcome is MigrationOutcome.ABORTED
    assert engine.spec_of("r", 9.0).epoch == FIRST_EPOCH
    assert step(engine).tokens == 1


@pytest.mark.parametrize("state", [SourceState.COMMITTING, SourceState.COMMIT_UNKNOWN])
def test_after_the_target_was_fenced_it_goes_on_past_the_epoch_the_target_may_have_used(
    state: SourceState,
) -> None:
    migration, engine = at(state)
    assert ended(migration.handle(PeerFenced(), 9.0)).outcome is MigrationOutcome.RESUMED
    assert engine.spec_of("r", 9.0).epoch == FIRST_EPOCH + RESUME_HOPS
    assert step(engine).tokens == 1


def test_silence_after_a_commit_is_no_answer_however_long() -> None:
    migration, engine = at(SourceState.COMMITTING)
    for asked in range(1, 6):
        assert migration.deadline == pytest.approx(1.2 + 5.0 if asked == 1 else asked * 10.0 - 5.0)
        assert messages(migration.handle(Timeout(), asked * 10.0)) == [QueryCommit("m", "tcp://source:1")]
        assert migration.state is SourceState.COMMIT_UNKNOWN
        assert not engine.has_work()
    migration.handle(COMMITTED, 99.0)
    assert migration.state is SourceState.COMMITTED


def test_a_client_abort_before_the_commit_frees_both_sides() -> None:
    migration, engine = at(SourceState.COPYING)
    effects = migration.handle(ClientAbort(FIRST_EPOCH), 2.0)
    assert messages(effects, AbortMigration)
    assert not engine.holds("r")


ALL_HOPS = FIRST_EPOCH | HOP_MAX
"""What a client's own abort covers; a stale owner's is told the stale epoch only."""


@pytest.mark.parametrize("state", [SourceState.COMMITTING, SourceState.COMMIT_UNKNOWN])
def test_a_client_abort_during_the_commit_ends_the_request_on_both_sides(state: SourceState) -> None:
    migration, engine = at(state)
    effects = migration.handle(ClientAbort(ALL_HOPS), 2.0)
    assert not engine.holds("r")
    first, then = sent_to(effects, TARGET)
    assert isinstance(first, AbortMigration)  # if it is undecided there
    assert then == Abort("r", ALL_HOPS)  # if it has been adopted
    assert migration.ended


@pytest.mark.parametrize("state", [SourceState.COMMITTING, SourceState.COMMIT_UNKNOWN])
def test_telling_a_stale_owner_to_stop_does_not_stop_the_new_one(state: SourceState) -> None:
    migration, engine = at(state)
    assert migration.handle(ClientAbort(FIRST_EPOCH), 2.0) == []
    assert engine.holds("r")
    assert not messages(migration.handle(COMMITTED, 3.0), Abort)


@pytest.mark.parametrize("state", list(TRANSITIONS))
def test_a_newer_generation_ends_the_migration(state: SourceState) -> None:
    migration, _ = at(state)
    effects = migration.handle(Superseded(), 2.0)
    assert migration.state is SourceState.ABORTED
    assert messages(effects, AbortMigration)


def test_committed_at_another_epoch_is_the_targets_fault() -> None:
    migration, engine = at(SourceState.COMMITTING)
    with pytest.raises(ProtocolError, match="epoch"):
        migration.handle(Committed("m", FIRST_EPOCH + 7), 2.0)
    assert migration.state is SourceState.COMMITTING
    assert engine.holds("r")


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", list(TRANSITIONS))
def test_every_pair_is_in_the_table_or_raises_with_the_story(state: SourceState, event: object) -> None:
    migration, _ = at(state)
    row = TRANSITIONS[state].get(type(event))
    if row is None:
        with pytest.raises(ProtocolError, match="migration m of r to target"):
            migration.handle(event, 2.0)
        assert migration.state is state
    else:
        migration.handle(event, 2.0)
        assert migration.state in row[1]


def test_what_has_ended_takes_nothing_more() -> None:
    migration, _ = at(SourceState.COPYING)
    migration.handle(Timeout(), 9.0)
    assert migration.ended
    assert migration.deadline is None
    assert set(TRANSITIONS) == set(SourceState) - set(ENDED)
    with pytest.raises(ProtocolError):
        migration.handle(RESERVED, 9.0)


def test_what_keeps_kv_from_moving_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    migration, engine = at(SourceState.COPYING)
    state = engine.movable("r")
    assert state is not None
    monkeypatch.setattr(engine, "movable", lambda request_id: replace(state, hindrance="no room"))
    (abort, last) = messages(migration.handle(StepEnded(), 1.1))
    assert abort == AbortMigration("m", "no room")
    assert isinstance(last, MigrationEnded) and last.reason == "no room"


class LaggingEngine(InProcessEngine):
    """Keeps its KV elsewhere: blocks are in the pool that peers read only once ``there`` says so."""

    there = 0

    def movable(self, request_id: str) -> MovableState | None:
        state = super().movable(request_id)
        if state is None or state.full_blocks <= self.there:
            return state
        return replace(state, full_blocks=self.there, lagging=True)


def test_blocks_that_are_not_in_the_pool_yet_are_waited_for_while_the_request_runs() -> None:
    config = EngineConfig(kind="simulated", block_size=4, kv_blocks=64)
    engine = LaggingEngine(SimulatedExecutor(config), config)
    running(engine, prompt_len=16, steps=4)
    migration, _ = begun(engine)
    assert migration.handle(RESERVED, 1.0) == []
    assert migration.state is SourceState.COPYING
    step(engine)
    assert migration.handle(StepEnded(), 1.1) == []
    assert migration.handle(Reserved("m", 15.0), 1.1) == []
    engine.there = 3
    step(engine)
    (first,) = messages(migration.handle(StepEnded(), 1.2))
    assert isinstance(first, CopyStage)
    assert len(first.source_blocks) == 3
    engine.there = 64
    migration.handle(StageCopied("m", 1, 0.1), 1.3)
    assert migration.state in (SourceState.COPYING, SourceState.READY)
    assert migration.handle(StageCopied("m", 1, 0.1), 1.3) == []  # a repeat counts nothing twice
    assert migration.deadline == 1.3 + CONFIG.answer_timeout_s
