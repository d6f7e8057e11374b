"""Blocks of vLLM that are kept though no request of vLLM has them, so that one which is about to come, or to
come back, finds its leading blocks in vLLM's prefix cache.

A hold counts as vLLM counts a request's: by the block pool's own methods. It never outweighs a request of
vLLM: when those need the blocks, all holds are let go, and whoever counted on one does without (its KV is
computed again, or a migration denied). Used by the engine adapter, between steps, for what a migration's
target has already: there until vLLM has taken the request in (vllm_arrivals.py), and at its source until the
migration is decided (vllm_core.py). Bounded by the migrations that may run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llumnix.instance.vllm_exchange import Exchange


@dataclass(slots=True, eq=False)
class Hold:
    """A request's leading blocks, in order; none once it has been let go."""

    blocks: list[Any] = field(default_factory=list)


class Holds:
    """See the module."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._held: dict[Hold, None] = {}

    @property
    def alone(self) -> int:
        """Blocks that are held here and by no request."""
        held = [block for hold in self._held for block in hold.blocks]
        holds = Counter(block.block_id for block in held)
        return len({block.block_id for block in held if block.ref_cnt == holds[block.block_id]})

    def hold(self, blocks: Sequence[Any]) -> Hold:
        """Keep these. They must be in vLLM's prefix cache."""
        hold = Hold(list(blocks))
        if blocks:
            self._exchange.block_pool.touch(hold.blocks)
            self._held[hold] = None
        return hold

    def let_go(self, hold: Hold) -> None:
        """Nobody counts on it any more; the last block goes first, as vLLM does it. One that has been let go
        already is fine."""
        if hold in self._held:
            del self._held[hold]
            blocks, hold.blocks = hold.blocks, []
            self._exchange.block_pool.free_blocks(reversed(blocks))

    def let_all_go(self) -> None:
        """Requests of vLLM need blocks."""
        for hold in list(self._held):
            self.let_go(hold)
