"""Whether an instance's blocks are about to run out, and who would have to give way first. Told in its load
reports, so that the manager can move that request away before. Called by the engine core."""

from llumnix.core.messages.load import MoveCandidate, Shortage
from llumnix.instance.local_scheduler import LocalScheduler

SHORT_STEPS = 32
SHORT_S = 1.0
"""A migration takes up to about so many steps, and while nothing else happens reports are half a second
apart: asked for later, it would come too late."""


def shortage(scheduler: LocalScheduler, free_tokens: int, step_s: float) -> Shortage | None:
    """None while free blocks, which have room for so many tokens, last longer than SHORT_STEPS steps and
    SHORT_S; each step of ``step_s`` adds a token to every request of the batch. A request that runs alone has
    nobody to give way to; one in its prefill has little to lose."""
    batch = scheduler.batch
    running = len(batch)
    steps = max(SHORT_STEPS, int(SHORT_S / step_s)) if step_s else SHORT_STEPS
    if running < 2 or free_tokens >= steps * running:
        return None
    victim = max(batch, key=scheduler.ranking.preemption_rank)
    if victim.request_id in batch.prefilling:
        return None
    tokens = len(victim.tokens)
    candidate = MoveCandidate(
        victim.request_id,
        len(victim.blocks),
        victim.execution_priority,
        False,
        tokens,
        tokens - victim.prompt_len,
        victim.arrived_at,
        adapter=victim.adapter,
        scheduling_priority=victim.scheduling_priority,
    )
    return Shortage(candidate, free_tokens // running, scheduler.switching.loss_s(victim))
