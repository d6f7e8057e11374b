"""Hundreds of stories of faults end well, the same seed tells the same story, and the checkers have teeth."""

from functools import cache

import pytest

from llumnix.api import stream_books, streams
from llumnix.api.backend import FailKind
from llumnix.api.stream_state import Effect, Stream
from llumnix.core.errors import InvariantError
from llumnix.instance.engine_core import EngineCore
from llumnix.sim import faults
from llumnix.sim.checks import check_tokens
from llumnix.sim.cost import LLAMA_7B_A10
from llumnix.sim.faults import run_seed
from llumnix.sim.simulation import Settings, Simulation
from llumnix.sim.tokens import tokens_of
from llumnix.sim.workload import Synthetic

SEEDS, CHUNK = 200, 25

told = cache(run_seed)
"""The story of a seed, told once."""


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_story_ends_well(first: int) -> None:
    for seed in range(first, first + CHUNK):
        finished = False
        try:
            told(seed)
            finished = True
        finally:
            if not finished:
                print(f"replay with: llumnix simulate faults --seed {seed} --seeds 1")


def test_stories_are_eventful_and_repeat_themselves() -> None:
    stories = [run_seed(seed) for seed in range(12)]
    assert stories == [run_seed(seed) for seed in range(12)]
    for name in ("finished", "continued", "migrations", "crashes", "manager_restarts", "preemptions"):
        assert sum(getattr(story, name) for story in stories) > 3, name
    assert len({(story.virtual_s, story.migrations) for story in stories}) == len(stories)


def test_swapped_out_requests_move_with_their_kv_and_for_want_of_room_without() -> None:
    stories = [told(seed) for seed in range(SEEDS)]
    assert sum(story.moved_from_host for story in stories) >= 12
    assert sum(story.left_kv for story in stories) >= 40


def stories_that_fail(seeds: int) -> list[str]:
    """What the first stories complain of."""
    complaints = []
    for seed in range(seeds):
        try:
            run_seed(seed)
        except InvariantError as error:
            complaints.append(str(error))
    return complaints


def test_two_owners_in_one_epoch_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_books, "next_generation", lambda epoch: epoch)
    assert any("in epoch" in complaint for complaint in stories_that_fail(6))


def test_leaked_reservations_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineCore, "cancel_reservation", lambda self, migration_id: None)
    assert any("reserved" in complaint for complaint in stories_that_fail(6))


def test_a_client_that_is_never_told_the_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.StreamTable, "tick", lambda self, now: [])
    assert any("still open" in complaint for complaint in stories_that_fail(6))


@pytest.mark.parametrize(
    ("kind", "complaint"), [(FailKind.LOST, "failed after"), (FailKind.INVALID, "was refused as invalid")]
)
def test_requests_that_are_given_up_are_noticed(
    kind: FailKind, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They counted as aborted or refused, and every story ended well."""

    def give_up(self: streams.StreamTable, stream: Stream, now: float) -> list[Effect]:
        return self._fail(stream, kind, "given up", 0.0)

    monkeypatch.setattr(streams.StreamTable, "_continue", give_up)
    assert any(complaint in told for told in stories_that_fail(16))


def test_requests_refused_long_after_healing_are_noticed() -> None:
    workload = Synthetic("9:5", 1.0, 1, seed=0)
    simulation = Simulation(Settings(faults.CONFIG, LLAMA_7B_A10, workload))
    (frontend,) = simulation.frontends
    frontend.refused[FailKind.OVERLOADED] += 1
    frontend.refused_at = faults.FAULTS_S + 2.0
    faults._check_refusals(simulation)
    frontend.refused_at = faults.FAULTS_S + faults.RECOVERED_S + 2.0
    with pytest.raises(InvariantError, match="12 s after healing"):
        faults._check_refusals(simulation)


def test_wrong_tokens_are_noticed() -> None:
    right = tuple(tokens_of(seed=5, start=7, count=9))
    check_tokens("r", 5, 4, 3, right)
    swapped = (*right[:3], right[4], right[3], *right[5:])
    for wrong in (right[::-1], right[1:], (right[0], *right), swapped):
        if wrong != right:
            with pytest.raises(InvariantError, match="wrong tokens from 3"):
                check_tokens("r", 5, 4, 3, wrong)
