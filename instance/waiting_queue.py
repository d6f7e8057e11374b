"""The requests waiting on one instance, in the order in which they are to be admitted.

Order: higher scheduling priority first; within one, the lane (ranking.py; most often a tenant) that stands
first; within a lane, earlier arrival, then id. Where lanes stand changes while requests wait, so they are
compared when the head is asked for; each lane's own order is kept. Knows the KV blocks all of them will need,
for load reports. A waiting request's tokens do not change, so neither does its need. Called by the local
scheduler.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice

from llumnix.instance.ranking import Ranking
from llumnix.instance.request import Request

Rank = tuple[float, str]
Key = tuple[int, str]


class WaitingQueue:
    """See the module. ``blocks`` is what the prefills of all requests in it need together; ``urgent`` and
    ``urgent_blocks`` are the number and need of those with a scheduling priority above 0."""

    def __init__(self, block_size: int, ranking: Ranking) -> None:
        self.blocks = self.urgent = self.urgent_blocks = 0
        self._block_size = block_size
        self._ranking = ranking
        self._ranks: dict[Key, list[Rank]] = {}
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __iter__(self) -> Iterator[Request]:
        for key in sorted(self._ranks, key=self._urgency):
            for _, request_id in self._ranks[key]:
                yield self._requests[request_id]

    @property
    def settled(self) -> bool:
        """Whether nothing but a newcomer can change who is the head."""
        return len(self._ranks) <= 1

    def blocks_of(self, request: Request) -> int:
        """Blocks that the KV of all its known tokens fills."""
        return -(-len(request.tokens) // self._block_size)

    def push(self, request: Request) -> None:
        """Add a request at its place."""
        insort(self._ranks.setdefault(self._key(request), []), (request.arrived_at, request.request_id))
        self._requests[request.request_id] = request
        self._count(request, 1)

    def remove(self, request: Request) -> None:
        """Take out a request that is in the queue."""
        key = self._key(request)
        ranks = self._ranks[key]
        del ranks[bisect_left(ranks, (request.arrived_at, request.request_id))]
        if not ranks:
            del self._ranks[key]
        del self._requests[request.request_id]
        self._count(request, -1)

    def head(self) -> Request | None:
        """The request to be admitted next."""
        if not self._ranks:
            return None
        key = next(iter(self._ranks)) if len(self._ranks) == 1 else min(self._ranks, key=self._urgency)
        return self._requests[self._ranks[key][0][1]]

    def first(self, count: int) -> list[Request]:
        """The ``count`` requests that would be admitted next, were all lanes to stand still."""
        return list(islice(self, count)) if self._requests else []

    def _count(self, request: Request, sign: int) -> None:
        blocks = sign * self.blocks_of(request)
        self.blocks += blocks
        if request.scheduling_priority > 0:
            self.urgent += sign
            self.urgent_blocks += blocks

    def _urgency(self, key: Key) -> tuple[int, float, Rank]:
        priority, lane = key
        return priority, self._ranking.standing(lane), self._ranks[key][0]

    def _key(self, request: Request) -> Key:
        return -request.scheduling_priority, self._ranking.lane(request)
