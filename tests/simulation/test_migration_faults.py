"""Migrations under every fault the network and the hosts can produce, many seeds each. A failing seed
names itself in the test's id, which is also how to replay it: ``pytest
'tests/simulation/test_migration_faults.py::<id>'``."""

from dataclasses import replace
from functools import cache

import pytest
from migration_node import ENGINE
from migration_world import Faults, World

from llumnix.core.config import SwapConfig
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import MigrationOutcome
from llumnix.instance.host_cache import HostCache
from llumnix.migration.copying import Copying
from llumnix.migration.source_commit import SentCommit

KINDS = {
    "calm": Faults(),
    "lossy": Faults(lost=0.1, doubled=0.1),
    "late": Faults(late=0.3, late_s=0.3, doubled=0.1),
    "crashes": Faults(crashes=2, failed_reads=0.05, crash_near_commit=0.2),
    "everything": Faults(
        lost=0.05,
        doubled=0.1,
        late=0.1,
        late_s=0.4,
        failed_reads=0.1,
        crashes=2,
        crash_near_commit=0.1,
    ),
}
SEEDS_PER_KIND = 48
SWAPPED_SEEDS = 24
CROWDED = replace(ENGINE, kv_blocks=30, batch_max=1)


@pytest.mark.parametrize("seed", range(SEEDS_PER_KIND))
@pytest.mark.parametrize("kind", KINDS)
def test_requests_survive(kind: str, seed: int) -> None:
    World(seed, KINDS[kind]).run()


@pytest.mark.parametrize("seed", range(SEEDS_PER_KIND))
@pytest.mark.parametrize("kind", ["lossy", "crashes", "everything"])
def test_waiting_requests_survive(kind: str, seed: int) -> None:
    world = World(seed, KINDS[kind], requests=20, engine=CROWDED)
    world.run()
    assert world.waiting_moves > 0


SWAPPING = SwapConfig(host_blocks=120, rerank_frequency=0.2, rerank_by="random")


@cache
def swapped(kind: str, seed: int) -> World:
    """A world in which requests are swapped out all the time, and moved while they are."""
    engine = replace(ENGINE, kv_blocks=26 if seed % 2 else 34, max_model_len=96)
    swap = replace(SWAPPING, host_blocks=(24, 40, 120)[seed % 3])
    world = World(seed, KINDS[kind], requests=24, engine=engine, swap=swap, orders=160, crowded=0.8)
    world.run()
    return world


@pytest.mark.parametrize("seed", range(SWAPPED_SEEDS))
@pytest.mark.parametrize("kind", KINDS)
def test_swapped_out_requests_survive(kind: str, seed: int) -> None:
    swapped(kind, seed)


def test_hundreds_of_them_moved_from_host_memory() -> None:
    worlds = [swapped(kind, seed) for kind in KINDS for seed in range(SWAPPED_SEEDS)]
    assert sum(world.moved_from_host for world in worlds) >= 150
    assert sum(world.left_kv for world in worlds) >= 150


BROKEN = {
    "leases are not given back": (HostCache, "end_lease", lambda cache, request: None),
    "KV that is gone still counts": (Copying, "lost", lambda copying, movable: "" if movable else "gone"),
    "a denied request is forgotten": (SentCommit, "_put_back", lambda migration: None),
    "a copy is taken to hold one token more": (
        HostCache,
        "usable_tokens",
        lambda cache, copy, request: min(copy.valid_tokens + 1, len(request.tokens) - 1),
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_around_host_memory_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[what])
    with pytest.raises((AssertionError, InvariantError)):
        for seed in range(8):
            for kind in KINDS:
                swapped.__wrapped__(kind, seed)


def test_the_faults_lead_to_every_outcome() -> None:
    reached: set[MigrationOutcome] = set()
    present = 0
    for seed in range(24):
        world = World(seed, KINDS["crashes"])
        world.run()
        reached.update(outcome for outcome, count in world.outcomes.items() if count)
        present += world.present_blocks
    assert reached == set(MigrationOutcome)
    assert present > 0, "no target ever had blocks of what came"


def test_the_same_seed_gives_the_same_world() -> None:
    runs = [World(3, KINDS["everything"]) for _ in range(2)]
    for world in runs:
        world.run()
    first, second = ([(c.call, c.tokens) for c in world.clients.values()] for world in runs)
    assert first == second
    assert runs[0].outcomes == runs[1].outcomes
    assert runs[0].now == runs[1].now
