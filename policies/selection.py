"""Which of its requests an instance offers to give away: run by the engine core when it fills a load report.

Policies of this kind see every movable request of one instance and keep the best few, best first.
"""

from collections.abc import Sequence

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.load import MoveCandidate

Cost = tuple[int | float | str, ...]


class Cheapest:
    """Lowest execution priority first, then what costs least to move: waiting requests, which no step counts
    on, those first that bring no KV from host memory; then few blocks. The others are like it but for what
    ``cost`` compares."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def select(self, rows: Sequence[MoveCandidate], limit: int) -> tuple[MoveCandidate, ...]:
        """At most ``limit`` of ``rows``, lowest cost first."""
        return tuple(sorted(rows, key=self.cost)[:limit])

    @staticmethod
    def cost(row: MoveCandidate) -> Cost:
        """What a request is compared by; the last part, its id, breaks ties."""
        copied = row.host_blocks if row.waiting else row.blocks
        return row.execution_priority, not row.waiting, copied, row.blocks, row.request_id


class Shortest(Cheapest):
    """Lowest execution priority first, then the fewest tokens."""

    @staticmethod
    def cost(row: MoveCandidate) -> Cost:
        return row.execution_priority, row.tokens, row.request_id


class Longest(Cheapest):
    """Lowest execution priority first, then the most tokens: fewest moves for the most room."""

    @staticmethod
    def cost(row: MoveCandidate) -> Cost:
        return row.execution_priority, -row.tokens, row.request_id


class LastCome(Cheapest):
    """Lowest execution priority first, then the latest arrival: whoever was here first is disturbed last."""

    @staticmethod
    def cost(row: MoveCandidate) -> Cost:
        return row.execution_priority, -row.arrived_at, row.request_id


class FirstWaiting(Cheapest):
    """The queue first, in its order and whatever its priorities, so that who waits longest gets away; then
    the cheapest."""

    def select(self, rows: Sequence[MoveCandidate], limit: int) -> tuple[MoveCandidate, ...]:
        """At most ``limit`` of ``rows``, best first; ``rows`` has waiting requests in queue order."""
        waiting = [row for row in rows if row.waiting]
        return (*waiting, *super().select([row for row in rows if not row.waiting], limit))[:limit]
