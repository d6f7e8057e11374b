"""When to hand a request over, so that it waits little and makes others wait little.

A request can join its target only where a step of the target begins. Leaving the source at any odd moment
costs it half a step on average. But both sides' steps have a rhythm: from the target's (told with its
answers, which it sends right before a step, and again once it has drifted from what it told) and the
source's own, the source knows how its coming step ends fall into the target's steps. At each of them, either
the request waits for the target's step to end, or, if that has only just begun, the target might as well
hold it back a little (``MigrationConfig.hold_share``). The source takes the step end at which this is least.
The one that has just come may be it; the target has heard nothing then, so it must not be too close.

Only durations and times of one clock, the source's, are used. Called by migration/source.py.
"""

from dataclasses import dataclass

STEPS_MAX = 8
"""The longest that a request that is ready to go is kept for a better moment, in steps of the source."""
STEP_COST = 0.004
"""What one more step at the source counts for, as a share of a target's step: between equals the first is
taken."""
MARGIN = 0.1
"""An unannounced commit must come this much before the target's step, as a share of one: its way takes time,
and what is missed by a little costs a whole step."""
DRIFT = 0.1
"""A target that has drifted this far from the rhythm it told, as a share of a step, tells it anew."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """A target's steps: one of ``step_s`` began at ``began_at``, on the clock of who heard of it."""

    began_at: float
    step_s: float

    def into_step(self, at: float) -> float:
        """How much of a step will have gone by at ``at``, 0 … 1. There must be steps (``step_s`` above 0)."""
        return (at - self.began_at) / self.step_s % 1.0

    def drifted(self, began_at: float) -> bool:
        """Whether a step that began then was not foreseen."""
        into = self.into_step(began_at)
        return min(into, 1.0 - into) > DRIFT


def steps_to_wait(
    now: float, step_s: float, target: Rhythm | None, *, hold_share: float, steps_max: int
) -> int:
    """How many more steps (0 to ``steps_max``) the source should run, from a step's end at ``now`` on,
    before it hands over. An idle target is handed over to at once; an unknown one, or by a source without a
    pace, after the next."""
    if target is not None and target.step_s <= 0:
        return 0
    if target is None or step_s <= 0:
        return 1
    wait = 1.0 - target.into_step(now)
    costs = [wait if wait >= MARGIN else 1.0]
    for steps in range(1, steps_max + 1):
        into = target.into_step(now + steps * step_s)
        costs.append((into if into <= hold_share else 1.0 - into) + STEP_COST * steps)
    return costs.index(min(costs))
