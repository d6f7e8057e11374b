"""The requests that compute on one instance, prefilling or decoding, and what their next steps will need.

Called by the local scheduler.
"""

from collections.abc import Iterator
from typing import NamedTuple

from llumnix.core.messages.control import RequestStatus
from llumnix.instance.request import Request


class QuietStretch(NamedTuple):
    """The next ``steps`` steps only decode the same ``requests`` requests; the first of them attends to
    ``context_tokens`` tokens in total, each later one to ``requests`` more."""

    steps: int
    requests: int
    context_tokens: int


NOT_QUIET = QuietStretch(0, 0, 0)


class Batch:
    """See the module. ``priorities`` counts the requests of each execution priority."""

    def __init__(self, block_size: int) -> None:
        self.prefilling: dict[str, Request] = {}
        self.decoding: dict[str, Request] = {}
        self.priorities: dict[int, int] = {}
        self._block_size = block_size

    def __len__(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def __iter__(self) -> Iterator[Request]:
        """Decodes first."""
        yield from self.decoding.values()
        yield from self.prefilling.values()

    def join(self, request: Request) -> None:
        """Add a request whose blocks are here."""
        request.status = RequestStatus.RUNNING
        request.joined_tokens = request.computed_tokens
        (self.decoding if request.prefilled else self.prefilling)[request.request_id] = request
        count = self.priorities.get(request.execution_priority, 0)
        self.priorities[request.execution_priority] = count + 1

    def leave(self, request: Request) -> None:
        """Remove a request that is in it."""
        if self.decoding.pop(request.request_id, None) is None:
            del self.prefilling[request.request_id]
        count = self.priorities[request.execution_priority] - 1
        if count:
            self.priorities[request.execution_priority] = count
        else:
            del self.priorities[request.execution_priority]

    def prefill_done(self, request: Request) -> None:
        """Its first token after a prefill was sampled: from the next step on it decodes."""
        self.decoding[request.request_id] = self.prefilling.pop(request.request_id)

    def prefill_again(self, request: Request) -> None:
        """Its KV is lost, its blocks are still here."""
        self.leave(request)
        request.computed_tokens = 0
        self.join(request)

    def plain_stretch(self, most: int) -> QuietStretch:
        """How many of the next steps, at most ``most``, end nothing but in the last of them, going by
        lengths; none if a request is not plain or prefills."""
        if self.prefilling or not self.decoding:
            return NOT_QUIET
        context = 0
        for request in self.decoding.values():
            if not request.plain:
                return NOT_QUIET
            known = len(request.tokens)
            left = request.tokens_max - known
            if left < most:
                most = left
            context += known
        return QuietStretch(most, len(self.decoding), context) if most > 0 else NOT_QUIET

    def growth(self, steps: int) -> int:
        """Blocks that the decoding requests take in the next ``steps`` steps."""
        size = self._block_size
        return sum(
            (len(request.tokens) + steps + size - 2) // size - len(request.blocks)
            for request in self.decoding.values()
        )

    def growth_each(self, steps: int) -> list[tuple[str, int]]:
        """The same by request, those that take none left out."""
        size = self._block_size
        ahead = steps + size - 2
        return [
            (request_id, count)
            for request_id, request in self.decoding.items()
            if (count := (len(request.tokens) + ahead) // size - len(request.blocks)) > 0
        ]

    def growths(self, steps: int) -> list[str]:
        """Whose each of those blocks is, in the order in which single steps would take them."""
        size = self._block_size
        order: list[tuple[int, int, str]] = []
        for place, request in enumerate(self.decoding.values()):
            first = len(request.blocks) * size + 1 - len(request.tokens)
            if first < steps:
                order += [(step, place, request.request_id) for step in range(first, steps, size)]
        return [request_id for _, _, request_id in sorted(order)]
