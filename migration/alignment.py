"""When to hand a request over, so that it waits little and makes others wait little.

A request can join its target only where a step of the target begins. Leaving the source at any odd moment
costs it half a step on average. But both sides' steps have a rhythm: from the target's (told with its
answers, which it sends right before a step) and the source's own, the source knows how its coming step
ends fall into the target's steps. At each of them, either the request waits for the target's step to end,
or, if that has only just begun, the target might as well hold it back a little
(``MigrationConfig.hold_share``). The source takes the step end at which this is least.

Only durations and times of one clock, the source's, are used. Called by migration/source.py.
"""

from dataclasses import dataclass

STEPS_MAX = 8
"""The longest that a request that is ready to go is kept for a better moment, in steps of the source."""
STEP_COST = 0.004
"""What one more step at the source counts for, as a share of a target's step: between equals the first is
taken."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """A target's steps: one of ``step_s`` began at ``began_at``, on the clock of who heard of it."""

    began_at: float
    step_s: float


def steps_to_wait(
    now: float, step_s: float, target: Rhythm | None, *, hold_share: float, steps_max: int
) -> int:
    """How many more steps (1 to ``steps_max``) the source should run, from a step's end at ``now`` on,
    before it hands over. An idle or unknown target, or a source without a pace, is handed over to after
    the next."""
    if target is None or target.step_s <= 0 or step_s <= 0:
        return 1
    costs = [
        _cost(now + steps * step_s, target, hold_share) + STEP_COST * steps
        for steps in range(1, steps_max + 1)
    ]
    return costs.index(min(costs)) + 1


def _cost(at: float, target: Rhythm, hold_share: float) -> float:
    """What a handover at ``at`` costs, as a share of a target's step: the request's wait or the target's."""
    into_step = (at - target.began_at) / target.step_s % 1.0
    return into_step if into_step <= hold_share else 1.0 - into_step
