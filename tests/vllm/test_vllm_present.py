"""A real vLLM engine gives a request away whose first blocks the target has, and takes it: the one engine is
both, so all full blocks are present. They are neither copied nor need room in the pool, and wherever the
request goes on, it goes on from vLLM's own."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from migration_driving import CONFIG, MANAGER, messages, order, pace
from small_llama import small_llama
from test_vllm_engine import ANY_EPOCH, EPOCHS, Run, copy_here, spec

from llumnix.core.config import EngineConfig
from llumnix.core.messages.control import InstanceHello, InstanceRole, MigrationEnded
from llumnix.core.messages.migration import Commit, Committed, Denied, Reserve, Reserved
from llumnix.instance.vllm_engine import POOL_FULL, VllmEngine
from llumnix.migration.pace import CopySpeeds
from llumnix.migration.source import SourceMigration
from llumnix.migration.source_state import SourceState
from llumnix.runtime.instance_factory import kv_endpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CAPACITY_TOKENS = 960
BLOCK_BYTES = 4 * 2 * 4 * 16 * 32 * 4
POOL_BLOCKS = 16
PROMPT_LEN = 325
"""20 blocks and a bit, more than the pool holds."""
PRESENT = 20
STARTS = count(3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    config = EngineConfig(
        kind="vllm",
        model=small_llama(tmp_path_factory.mktemp("model")),
        device="cpu",
        dtype="float32",
        kv_blocks=CAPACITY_TOKENS // 16,
        max_model_len=800,
        staging_gib=(POOL_BLOCKS + 0.5) * BLOCK_BYTES / (1 << 30),
        step_tokens_max=256,
        threads=1,
        engine_args="enforce_eager=true;block_size=32",
    )
    engine = VllmEngine(config, "test-present")
    assert engine.kv_layout.blocks == POOL_BLOCKS
    yield engine
    engine.close()


def new_prompt(length: int) -> tuple[int, ...]:
    """One that no cache knows."""
    return (next(STARTS), *range(100, 100 + length - 1))


class Leaving:
    """A request ``a`` that has run for some steps, and the source's side of a migration of it."""

    def __init__(self, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = engine
        prompt = new_prompt(PROMPT_LEN)
        self.undisturbed = Run(engine, spec("a", prompt)).out()["a"]
        self.run = Run(engine, spec("a", prompt))
        self.run.step(8)
        self.loads: list[tuple[int, int]] = []
        copier = engine._core.exchange.copier
        copy_in = copier.copy_in

        def noted(pool: Any, pool_blocks: Any, blocks: Any, *, first: int, end: int) -> None:
            self.loads.append((first, end))
            copy_in(pool, pool_blocks, blocks, first=first, end=end)

        monkeypatch.setattr(copier, "copy_in", noted)

    def begin(self) -> Reserve:
        """What the source asks for."""
        engine = self.engine
        me = InstanceHello(
            instance_id="source",
            incarnation="source-1",
            address="tcp://source:1",
            role=InstanceRole.NEUTRAL,
            model="small",
            max_model_len=engine.max_model_len,
            kv_layout=engine.kv_layout,
            kv_endpoint=kv_endpoint(engine.pool, ""),
        )
        self.migration = SourceMigration(
            order("a"),
            me,
            engine=engine,
            config=replace(CONFIG, hold_share=0.0),
            pace=pace(),
            speeds=CopySpeeds(),
            manager_address=MANAGER,
        )
        (ask,) = messages(self.migration.begin(1.0))
        assert isinstance(ask, Reserve) and ask.full_blocks == PRESENT
        return ask

    def commit(self) -> tuple[Commit, tuple[int, ...]]:
        """Find all full blocks present, and have the source send its commit. Returns the blocks it is to be
        read into, too."""
        ask, engine = self.begin(), self.engine
        assert engine.keep_present("m", ask.spec, ask.full_blocks) == PRESENT
        reserved = engine.reserve("m", ask.blocks)
        assert reserved is not None and len(reserved) == ask.blocks - PRESENT
        assert engine.load().reserved_blocks == ask.blocks
        (commit,) = messages(self.migration.handle(Reserved("m", 15.0, present_blocks=PRESENT), 1.0))
        assert isinstance(commit, Commit) and len(commit.source_blocks) == 1
        assert commit.computed_tokens // 16 == PRESENT
        assert engine._staging.blocks.owned_blocks < POOL_BLOCKS // 2
        assert engine._core.holds.alone == PRESENT * 16 // 32
        return commit, reserved

    def denied(self) -> None:
        self.migration.handle(Denied("m", "no"), 1.0)
        self.engine.end_move("a")
        assert self.migration.state is SourceState.ABORTED

    def denied_beside(self, other: Run) -> None:
        """The request goes on here beside another, and says what it would have said."""
        self.denied()
        self.run.said |= other.said
        assert self.run.out()["a"] == self.undisturbed

    def churn(self) -> None:
        """Another request takes, and leaves, nearly every block of vLLM that nobody holds."""
        free = self.engine._core.exchange.free_blocks()
        steps = Run(self.engine, spec("o", new_prompt(min(780, (free - 1) * 32 - 4)), max_tokens=4))
        while self.engine.has_work():
            steps.step()
        assert self.engine._core.holds.alone == PRESENT * 16 // 32


def first_step(run: Run, name: str) -> int:
    """Of a request that joins: how much of it has been computed then."""
    live = run.engine._core.entered[name].live
    run.step()
    return int(live.num_computed_tokens)


def test_a_refused_commit_goes_on_from_what_vllm_kept(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving = Leaving(engine, monkeypatch)
    commit, _ = leaving.commit()
    engine.cancel_reservation("m")
    leaving.churn()
    assert engine.rows("i", 0.0)[0].blocks == PRESENT + 1
    leaving.denied()
    assert first_step(leaving.run, "a") == commit.computed_tokens + 1
    assert leaving.loads == [(0, commit.computed_tokens - PRESENT * 16)]
    assert engine._core.holds.alone == 0
    assert leaving.run.out()["a"] == leaving.undisturbed


def test_a_commit_is_taken_on_from_what_vllm_kept(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving, reader = Leaving(engine, monkeypatch), copy_here(engine)
    commit, reserved = leaving.commit()
    reader.read(commit.source_blocks, reserved[:1], 1.0, urgent=True)
    moving = engine.spec_of("a", 0.0)
    leaving.churn()
    arrived = replace(moving, request_id="b", epoch=next(EPOCHS))
    assert engine.adopt("m", arrived, commit.computed_tokens, 0.0) is None
    leaving.migration.handle(Committed("m", commit.epoch), 1.0)
    engine.end_move("a")
    assert not engine.holds("a")
    run = leaving.run
    run.said["b"] = list(arrived.output_tokens)
    assert first_step(run, "b") == commit.computed_tokens + 1
    assert leaving.loads == [(0, commit.computed_tokens - PRESENT * 16)]
    assert engine._core.holds.alone == 0 and engine.load().reserved_blocks == 0
    assert run.out()["b"] == leaving.undisturbed


def test_without_what_is_present_the_pool_is_too_small(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving = Leaving(engine, monkeypatch)
    ask = leaving.begin()
    assert engine.reserve("n", ask.blocks) is None
    (_, ended) = messages(leaving.migration.handle(Reserved("m", 15.0, present_blocks=0), 1.0))
    engine.end_move("a")
    assert isinstance(ended, MigrationEnded) and "no room for its KV" in ended.reason
    leaving.run.step()
    assert engine.begin_move("a", PRESENT - 1) == ""
    state = engine.movable("a")
    assert state is not None
    assert state.first_block == PRESENT - 2, "blocks of vLLM are held whole"
    assert state.first_block + len(state.blocks) == PRESENT + 1
    engine.end_move("a")
    assert leaving.run.out()["a"] == leaving.undisturbed


def test_a_pool_that_fills_up_is_told(engine: VllmEngine) -> None:
    prompt, pool = new_prompt(PROMPT_LEN), engine._staging.blocks
    undisturbed = Run(engine, spec("a", prompt, max_tokens=140)).out()["a"]
    run = Run(engine, spec("a", prompt, max_tokens=140))
    run.step(4)
    assert engine.begin_move("a", PRESENT) == ""
    assert pool.reserve("others", pool.free_blocks) is not None
    while (state := engine.movable("a")) is not None and not state.hindrance:
        run.step()
    assert state is not None and state.hindrance == POOL_FULL
    pool.cancel("others")
    engine.end_move("a")
    assert run.out()["a"] == undisturbed


def test_requests_of_vllm_come_before_what_is_kept(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving = Leaving(engine, monkeypatch)
    commit, _ = leaving.commit()
    grows = Run(engine, spec("o", new_prompt(560), max_tokens=140))
    while engine._core.holds.alone:
        grows.step()
        assert engine.holds("o"), "nobody needed the blocks"
    assert not grows.preempted
    arrived = replace(engine.spec_of("a", 0.0), request_id="b", epoch=next(EPOCHS))
    refused = engine.adopt("m", arrived, commit.computed_tokens, 0.0)
    assert refused is not None and "had to make room" in refused.reason
    assert engine.reserve("m", PRESENT + 3) is None
    engine.cancel_reservation("m")
    leaving.denied_beside(grows)


def test_what_is_kept_is_room_for_newcomers(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    leaving = Leaving(engine, monkeypatch)
    leaving.commit()
    engine.cancel_reservation("m")
    newcomer = spec("o", new_prompt((engine._core.exchange.free_blocks() + 2) * 32), max_tokens=8)
    grows = Run(engine, newcomer)
    grows.step()
    assert engine._core.entered["o"].running and engine._core.holds.alone == 0
    leaving.denied_beside(grows)


def test_what_is_kept_goes_with_its_request(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    leaving = Leaving(engine, monkeypatch)
    leaving.commit()
    engine.cancel_reservation("m")
    assert engine.abort("a", ANY_EPOCH)
    assert engine._core.holds.alone == 0
    assert not leaving.loads and not engine.has_work()
    leaving.run.out()
