"""The requests waiting on one instance, in the order in which they are to be admitted.

Order: higher scheduling priority first, then earlier arrival, then id. Knows the KV blocks all of them will
need, for load reports. A waiting request's tokens do not change, so neither does its need. Called by the
local scheduler.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice

from llumnix.instance.request import Request

Rank = tuple[int, float, str]


def _rank(request: Request) -> Rank:
    return -request.scheduling_priority, request.arrived_at, request.request_id


class WaitingQueue:
    """See the module. ``blocks`` is what the prefills of all requests in it need together."""

    def __init__(self, block_size: int) -> None:
        self.blocks = 0
        self._block_size = block_size
        self._ranks: list[Rank] = []
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __iter__(self) -> Iterator[Request]:
        return (self._requests[rank[2]] for rank in self._ranks)

    def blocks_of(self, request: Request) -> int:
        """Blocks that the KV of all its known tokens fills."""
        return -(-len(request.tokens) // self._block_size)

    def push(self, request: Request) -> None:
        """Add a request at its place."""
        insort(self._ranks, _rank(request))
        self._requests[request.request_id] = request
        self.blocks += self.blocks_of(request)

    def remove(self, request: Request) -> None:
        """Take out a request that is in the queue."""
        del self._ranks[bisect_left(self._ranks, _rank(request))]
        del self._requests[request.request_id]
        self.blocks -= self.blocks_of(request)

    def head(self) -> Request | None:
        """The request to be admitted next."""
        return self._requests[self._ranks[0][2]] if self._ranks else None

    def first(self, count: int) -> list[Request]:
        """The ``count`` requests to be admitted next."""
        return list(islice(self, count))
