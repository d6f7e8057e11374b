"""Blocks that a migration's target has already: it says how many, and neither side moves them."""

from dataclasses import replace

import pytest
from engine_driving import small_engine, spec, step, undisturbed
from migration_driving import (
    CONFIG,
    MANAGER,
    READ,
    agent,
    commit,
    hello,
    messages,
    order,
    pace,
    reserve,
    running,
    stage,
)

from llumnix.core.config import EngineConfig
from llumnix.core.epochs import EPOCH_MAX, FIRST_EPOCH
from llumnix.core.messages.control import Fenced, MigrationEnded
from llumnix.core.messages.migration import (
    AbortMigration,
    Commit,
    Committed,
    CopyStage,
    Denied,
    RefusalCode,
    Refused,
    Reserve,
    Reserved,
    StageCopied,
)
from llumnix.core.messages.serving import Abort, Submit
from llumnix.instance.engine import MovableState
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.simulated_executor import SimulatedExecutor
from llumnix.migration.events import ReadEnded, StartRead
from llumnix.migration.pace import CopySpeeds
from llumnix.migration.source import SourceMigration
from llumnix.migration.source_state import SourceState
from llumnix.migration.target import TargetMigration

REQUEST = spec("r", prompt_len=8, max_tokens=20)
OUTPUT = undisturbed(REQUEST)


def begun(engine: InProcessEngine) -> SourceMigration:
    """Of a request with 18 tokens computed, in 4 full blocks and a bit."""
    running(engine, prompt_len=16, steps=4)
    migration = SourceMigration(
        order(),
        hello("source", engine),
        engine=engine,
        config=replace(CONFIG, hold_share=0.0),
        pace=pace(),
        speeds=CopySpeeds(),
        manager_address=MANAGER,
    )
    (ask,) = messages(migration.begin(1.0))
    assert isinstance(ask, Reserve)
    assert ask.full_blocks == 4
    return migration


class ToldEngine(InProcessEngine):
    """Remembers which moves it was told have ended; what is kept for a move elsewhere goes then."""

    def __init__(self) -> None:
        config = EngineConfig(kind="simulated", block_size=4, kv_blocks=16)
        super().__init__(SimulatedExecutor(config), config)
        self.ended: list[str] = []

    def end_move(self, request_id: str) -> None:
        self.ended.append(request_id)


@pytest.mark.parametrize(
    "end",
    [
        Denied("m", "no"),
        Refused("m", RefusalCode.DRAINING, "no"),
        Fenced("target", "target-1"),
        Abort("r", EPOCH_MAX),
        Committed("m", FIRST_EPOCH + 1),
    ],
    ids=lambda end: type(end).__name__,
)
def test_the_engine_hears_of_a_move_s_end_however_it_ends(end: object) -> None:
    engine = ToldEngine()
    one = agent("source", engine)
    one.handle(Submit(spec("r", max_tokens=20)), 1.0)
    if not isinstance(end, Committed):  # a waiting request is committed by its only message
        one.after_step(step(engine), 1.0)
    one.handle(order(), 1.0)
    assert one.migrating and not engine.ended
    one.handle(end, 1.1)
    assert not one.migrating and engine.ended == ["r"]


def test_stages_begin_behind_what_the_target_has() -> None:
    engine = small_engine()
    migration = begun(engine)
    (first,) = messages(migration.handle(Reserved("m", 15.0, present_blocks=2), 1.0))
    blocks = engine.movable("r").blocks  # type: ignore[union-attr]
    assert isinstance(first, CopyStage)
    assert first.source_blocks == blocks[2:4]
    assert migration.handle(Reserved("m", 15.0, present_blocks=2), 1.0) == []
    (last,) = messages(migration.handle(StageCopied("m", 1, 0.1), 1.1))
    assert isinstance(last, Commit)
    assert last.source_blocks == blocks[4:5]


def test_a_target_that_has_all_full_blocks_gets_the_commit_at_once() -> None:
    engine = small_engine()
    migration = begun(engine)
    (last,) = messages(migration.handle(Reserved("m", 15.0, present_blocks=4), 1.0))
    assert isinstance(last, Commit)
    assert last.computed_tokens == 18
    assert len(last.source_blocks) == 1


def test_blocks_that_the_target_has_need_not_be_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine()
    migration = begun(engine)
    every, begun_with = engine.movable, list[tuple[str, int]]()

    def begin_move(request_id: str, present_blocks: int) -> str:
        begun_with.append((request_id, present_blocks))
        return ""

    def movable(request_id: str) -> MovableState | None:
        state = every(request_id)
        assert state is not None
        return replace(state, blocks=state.blocks[1:], first_block=1)  # it makes one more readable than asked

    monkeypatch.setattr(engine, "begin_move", begin_move)
    monkeypatch.setattr(engine, "movable", movable)
    whole = every("r")
    assert whole is not None
    (first,) = messages(migration.handle(Reserved("m", 15.0, present_blocks=2), 1.0))
    assert isinstance(first, CopyStage)
    assert (begun_with, first.source_blocks) == ([("r", 2)], whole.blocks[2:4])
    (last,) = messages(migration.handle(StageCopied("m", 1, 0.1), 1.1))
    assert isinstance(last, Commit)
    assert last.source_blocks == whole.blocks[4:5]


def test_a_source_that_cannot_have_the_others_read_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine()
    migration = begun(engine)
    monkeypatch.setattr(engine, "begin_move", lambda *asked: "no room")
    (abort, ended) = messages(migration.handle(Reserved("m", 15.0, present_blocks=2), 1.0))
    assert abort == AbortMigration("m", "no room")
    assert isinstance(ended, MigrationEnded) and ended.reason == "no room"
    step(engine)
    assert engine.movable("r") is not None


@pytest.mark.parametrize("present", [-1, 5])
def test_a_target_that_claims_what_cannot_be_is_left(present: int) -> None:
    engine = small_engine()
    migration = begun(engine)
    (abort, _ended) = messages(migration.handle(Reserved("m", 15.0, present_blocks=present), 1.0))
    assert abort == AbortMigration("m", f"the target says it has {present} blocks")
    assert migration.state is SourceState.ABORTED
    step(engine)
    assert engine.movable("r") is not None


def test_blocks_that_are_here_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine()
    asked: list[int] = []

    def present(migration_id: str, request: object, blocks_max: int) -> int:
        assert engine.load().reserved_blocks == 0  # reserving might take what is found here
        asked.append(blocks_max)
        return 2

    reserve_all = engine.reserve
    monkeypatch.setattr(engine, "keep_present", present)
    monkeypatch.setattr(engine, "reserve", lambda *wanted: (reserve_all(*wanted) or ())[2:] or None)
    ask = replace(reserve(REQUEST, 5), full_blocks=3)
    migration = TargetMigration(ask, engine=engine, config=CONFIG, pace=pace())
    told = Reserved("m", CONFIG.reservation_s, present_blocks=2)
    assert messages(migration.begin(1.0)) == [told]
    assert messages(migration.handle(ask, 1.0)) == [told]
    assert asked == [3]
    (first,) = migration.handle(stage(1, (6,), 6), 1.0)
    assert isinstance(first, StartRead)
    migration.handle(ReadEnded(1, READ), 1.1)
    (last,) = migration.handle(commit((7,), 13, OUTPUT[:6]), 1.2)
    assert isinstance(last, StartRead)
    held = reserve_all("m", 6)
    assert held is not None
    assert (first.target_blocks, last.target_blocks) == ((held[2],), (held[3],))
