"""Who goes before whom on one instance: the order in which requests are admitted, give way, and, every so
many steps, displace each other.

Priorities come first. Within one, requests are ranked by lane: a lane is a tenant, standing where its virtual
counter stands, or, under a priority trace, a single request. Called by the waiting queue and the local
scheduler.
"""

from collections.abc import Iterable

from llumnix.core.config import SwapConfig
from llumnix.instance.priority_trace import PriorityTrace
from llumnix.instance.request import Request
from llumnix.instance.tenant_counters import TenantCounters

TRACE_SEED = 0


class Ranking:
    """See the module."""

    def __init__(self, tenants: TenantCounters, config: SwapConfig) -> None:
        self._tenants = tenants
        self._interval = round(1 / config.rerank_frequency) if config.rerank_frequency else 0
        self._trace: PriorityTrace | None = None
        if config.rerank_by != "tenants":
            self._trace = PriorityTrace(TRACE_SEED, markov=config.rerank_by == "markov")
        self._steps = 0
        self._ranks: dict[str, float] = {}

    @property
    def fixed(self) -> bool:
        """Whether no lane's standing changes before the next update."""
        return self._trace is not None

    def lane(self, request: Request) -> str:
        """What a request is ranked by."""
        return request.tenant if self._trace is None else request.request_id

    def standing(self, lane: str) -> float:
        """Where a lane stands; lower goes first."""
        if self._trace is None:
            return self._tenants.counter(lane)
        if not self._interval:  # no update would ever forget the ranks of requests that are gone
            return self._trace.rank(lane, 0)
        rank = self._ranks.get(lane)
        if rank is None:
            rank = self._ranks[lane] = self._trace.rank(lane, self._steps // self._interval)
        return rank

    def steps_done(self, steps: int) -> None:
        """So many steps have been begun."""
        before = self._steps
        self._steps += steps
        if self._interval and self._steps // self._interval != before // self._interval:
            self._ranks.clear()

    def until_update(self) -> int | None:
        """Steps before the one in which requests displace each other again; None: they never do. 0: the next
        one."""
        return -self._steps % self._interval if self._interval else None

    def preemption_rank(self, request: Request) -> tuple[int, float, float, str]:
        """The highest gives way first."""
        standing = self.standing(self.lane(request))
        return -request.execution_priority, standing, request.arrived_at, request.request_id

    def last_first(self, requests: Iterable[Request]) -> list[Request]:
        """In the order in which they give way."""
        return sorted(requests, key=self.preemption_rank, reverse=True)

    def outranks(self, waiting: Request, running: Request) -> bool:
        """Whether a waiting request may displace a running one: neither of its priorities is lower, and one
        is higher or its lane stands ahead. By service, ahead means by more than what the running one holds,
        so that a switch is worth it and the two do not take turns."""
        if (
            waiting.scheduling_priority < running.scheduling_priority
            or waiting.execution_priority < running.execution_priority
        ):
            return False
        if (
            waiting.scheduling_priority > running.scheduling_priority
            or waiting.execution_priority > running.execution_priority
        ):
            return True
        margin = len(running.tokens) if self._trace is None else 0
        return self.standing(self.lane(waiting)) + margin < self.standing(self.lane(running))
