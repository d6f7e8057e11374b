"""Which of its requests an instance offers to give away: run by the engine core when it fills a load report.

Policies of this kind see every movable request of one instance and keep the best few, best first.
"""

import heapq
from collections.abc import Sequence

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import MoveCandidate


class Cheapest:
    """Lowest execution priority first, then what costs least to move: waiting requests carry no KV, then few
    blocks."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def select(self, rows: Sequence[MoveCandidate], limit: int) -> tuple[MoveCandidate, ...]:
        """At most ``limit`` of ``rows``, best first, ties by request id."""
        return tuple(heapq.nsmallest(limit, rows, key=_cost))


def _cost(row: MoveCandidate) -> tuple[int, bool, int, str]:
    return row.execution_priority, not row.waiting, row.blocks, row.request_id
