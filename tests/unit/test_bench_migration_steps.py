"""What the migration benchmark makes of the times at which tokens were heard."""

from itertools import accumulate

import pytest

from llumnix.bench.migration_steps import Window, compare

STEP, JOINED = 0.010, 0.012
WINDOW = Window(rested=1.0, ordered=1.1, last=1.15, first=1.2, settled=1.3)


def beats(*groups: tuple[int, float], begin: float = 0.9995) -> list[float]:
    """Times of tokens: so many steps of so many seconds each, one group after the other."""
    return list(accumulate([begin, *(step for count, step in groups for _ in range(count))]))


def test_steps_that_take_as_long_as_before_are_not_slower() -> None:
    steps = compare(WINDOW, beats((40, STEP)), beats((40, STEP)))
    assert steps is not None
    assert steps.slowdown == pytest.approx(0.0, abs=1e-9)
    assert steps.control == pytest.approx(0.0, abs=1e-9)
    assert steps.held_s == pytest.approx(0.0, abs=1e-9)


def test_slower_steps_and_the_targets_hold_count_and_those_after_do_not() -> None:
    # Before: 10 steps. While migrating: 4 of 11 ms at the source; at the target 8, and one held for 4 ms.
    source = beats((11, STEP), (4, 0.011), (10, 0.5))
    target = beats((11, STEP), (8, STEP), (1, JOINED + 0.004), (7, JOINED))
    window = Window(1.0, 1.105, source[15] + 1e-6, target[20], target[-1])
    steps = compare(window, source, target)
    assert steps is not None
    assert steps.held_s == pytest.approx(0.004)
    assert steps.migrating_s - steps.ordinary_s == pytest.approx(4 * 0.001 + 0.004)
    assert steps.count == 4 + 9


def test_too_few_steps_are_no_comparison() -> None:
    assert compare(WINDOW, beats((2, STEP)), beats((40, STEP))) is None
