"""When a request is handed over: at the step end that costs it and the target's batch least."""

import random

import pytest
from engine_driving import small_engine, step
from migration_driving import CONFIG, STEP_S, begun, running

from llumnix.core.messages.migration import Reserved, StageCopied
from llumnix.migration.alignment import STEP_COST, STEPS_MAX, Rhythm, steps_to_wait
from llumnix.migration.events import StepEnded
from llumnix.migration.pace import Pace
from llumnix.migration.source_state import SourceState

HOLD = 0.5


def wait(now: float, step_s: float, target: Rhythm | None, hold_share: float = HOLD) -> int:
    return steps_to_wait(now, step_s, target, hold_share=hold_share, steps_max=STEPS_MAX)


def test_an_idle_target_takes_it_at_once_an_unknown_one_after_the_next_step() -> None:
    assert wait(1.0, 0.02, Rhythm(0.0, 0.0)) == 0
    assert wait(1.0, 0.02, None) == 1


def test_it_leaves_at_once_if_the_targets_step_is_due_soon_but_not_too_soon() -> None:
    assert wait(1.0, 0.02, Rhythm(0.982, 0.024)) > 0  # 6 ms are left: too long
    assert wait(1.0, 0.02, Rhythm(0.984, 0.020)) == 0
    assert wait(1.0, 0.02, Rhythm(0.981, 0.020)) == 1  # 1 ms: too close


@pytest.mark.parametrize(("began_at", "drifted"), [(1.1, False), (1.109, False), (1.112, True), (1.05, True)])
def test_a_rhythm_knows_what_it_did_not_foresee(began_at: float, drifted: bool) -> None:
    assert Rhythm(1.0, 0.1).drifted(began_at) is drifted


def test_a_source_without_a_pace_waits_for_nothing_special() -> None:
    assert wait(1.0, 0.0, Rhythm(0.0, 0.02)) == 1


def test_slow_steps_of_the_source_are_no_silence_of_the_target() -> None:
    engine = small_engine()
    running(engine, prompt_len=16, steps=4)
    migration, _ = begun(engine)
    migration.handle(Reserved("m", 15.0), 1.0)
    migration.rhythm = Rhythm(1.0 + 0.6 * STEP_S, 1.2 * STEP_S)  # three more steps are best, as below
    migration.handle(StageCopied("m", 1, 0.1), 1.0)
    for now in (4.0, 7.0):
        assert migration.state is SourceState.READY
        assert migration.deadline == now - 3.0 + CONFIG.answer_timeout_s
        step(engine)
        migration.rhythm = Rhythm(now + 0.6 * STEP_S, 1.2 * STEP_S)
        assert migration.handle(StepEnded(), now) == []


def test_steps_that_end_together_are_used_at_once() -> None:
    assert wait(1.0, 0.02, Rhythm(1.0, 0.02)) == 1


def test_equal_steps_gain_nothing_by_waiting() -> None:
    for phase in range(10):
        assert wait(1.0, 0.02, Rhythm(1.0 + 0.002 * phase, 0.02)) <= 1


def test_it_waits_for_the_step_end_that_falls_together() -> None:
    # Ends at 20, 40, 60, … ms; the target's steps begin at 12, 36, 60 ms.
    assert wait(0.0, 0.020, Rhythm(0.012, 0.024)) == 3


def test_without_a_hold_it_comes_as_late_in_the_targets_step_as_it_can() -> None:
    # Ends fall 5, 10, 15, … per cent into the target's steps.
    assert wait(0.0, 0.021, Rhythm(0.0, 0.020)) == 1
    assert wait(0.0, 0.021, Rhythm(0.0, 0.020), hold_share=0.0) == STEPS_MAX


def test_at_any_phase_the_chosen_end_costs_no_more_than_the_next() -> None:
    chance = random.Random(5)
    for _ in range(2000):
        step_s, target = chance.uniform(0.01, 0.05), Rhythm(chance.random(), chance.uniform(0.01, 0.05))

        def cost(steps: int, step_s: float = step_s, target: Rhythm = target) -> float:
            into = (1.0 + steps * step_s - target.began_at) / target.step_s % 1.0
            return into if into <= HOLD else 1.0 - into

        chosen = wait(1.0, step_s, target)
        assert 0 <= chosen <= STEPS_MAX
        assert cost(chosen) <= cost(1) + STEP_COST


def test_the_pace_is_the_median_of_the_last_steps() -> None:
    pace = Pace()
    assert pace.step_s == 0.0
    pace.note((0.02, 0.02, 0.9))
    assert pace.step_s == 0.02
    for _ in range(20):
        pace.note((0.03,))
    assert pace.step_s == 0.03
