"""What an instance offers to give away, by the selection policy in force. Called by the engine core for every
load report.

The policy may be other people's code: if it raises, or returns what it was not given, the default selects for
that once, and the fault is kept for the next reports, so that the manager can tell.
"""

from collections.abc import Callable, Sequence

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.views import SelectionPolicy
from llumnix.instance.batch import Batch
from llumnix.instance.request import Request
from llumnix.instance.waiting_queue import WaitingQueue
from llumnix.policies.guard import attempt
from llumnix.policies.selection import Cheapest

CANDIDATES_MAX = 4
WAITING_CANDIDATES_MAX = 2
ROOM_CANDIDATES_MAX = 16
FAULT_CHARS_MAX = 300


class MoveOffers:
    """``fault`` says what the policy did wrong last; empty: nothing since it is in force."""

    def __init__(self, policy: SelectionPolicy | None) -> None:
        self._default: SelectionPolicy = Cheapest(SchedulerConfig())
        self.use(policy or self._default)

    def use(self, policy: SelectionPolicy) -> None:
        """Select by this policy from now on."""
        self._policy = policy
        self.fault = ""

    def offers(
        self,
        batch: Batch,
        waiting: WaitingQueue,
        missing: int = 0,
        host_blocks: Callable[[Request], int] = lambda _: 0,
    ) -> tuple[MoveCandidate, ...]:
        """The requests offered now, best first: of all that run and the next few to be admitted, which have
        so many blocks in host memory. The head of the queue lacks ``missing`` blocks."""
        rows = [_candidate(request, len(request.blocks), 0) for request in batch]
        for one in waiting.first(WAITING_CANDIDATES_MAX):
            rows.append(_candidate(one, waiting.blocks_of(one), host_blocks(one)))
        return self.offered(rows, missing)

    def offered(self, rows: Sequence[MoveCandidate], missing: int = 0) -> tuple[MoveCandidate, ...]:
        """The best CANDIDATES_MAX of ``rows``. Behind them the best of those that run with an execution
        priority above 0, if none of them is among these: instances kept clear for their like gather them. And
        while the head of the queue lacks ``missing`` blocks, those that could make room for it."""
        best = self.best(rows, CANDIDATES_MAX)
        urgent = [row for row in rows if row.execution_priority > 0 and not row.waiting]
        if urgent and not any(row.execution_priority > 0 for row in best):
            best = (*best, *self.best(urgent, 1))
        return (*best, *_room_makers(rows, best, missing)) if missing > 0 else best

    def best(self, rows: Sequence[MoveCandidate], limit: int) -> tuple[MoveCandidate, ...]:
        """At most ``limit`` of ``rows``, best first."""
        chosen, fault = attempt(self._policy.select, rows, limit)
        if isinstance(chosen, tuple) and len(chosen) <= limit and _all_of(chosen, rows):
            return chosen
        name = type(self._policy).__name__
        self.fault = f"selection: {name} {fault or f'returned {chosen!r}'}"[:FAULT_CHARS_MAX]
        return self._default.select(rows, limit)


def _candidate(request: Request, blocks: int, host_blocks: int) -> MoveCandidate:
    known = len(request.tokens)
    return MoveCandidate(
        request.request_id,
        blocks,
        request.execution_priority,
        not request.blocks,
        known,
        known - request.prompt_len,
        request.arrived_at,
        host_blocks,
        request.adapter,
        request.scheduling_priority,
    )


def _room_makers(
    rows: Sequence[MoveCandidate], offered: Sequence[MoveCandidate], missing: int
) -> list[MoveCandidate]:
    """Of the running requests of no priority not offered yet, those that free the most without freeing more
    than is missing; after them those that free the least of what is enough."""
    known = {row.request_id for row in offered}
    rest = [
        row for row in rows if not row.waiting and row.execution_priority <= 0 and row.request_id not in known
    ]
    rest.sort(key=lambda row: (row.blocks > missing, abs(row.blocks - missing), row.request_id))
    return rest[:ROOM_CANDIDATES_MAX]


def _all_of(chosen: Sequence[MoveCandidate], rows: Sequence[MoveCandidate]) -> bool:
    """Whether all that was chosen is among what there is; as a rule it is the same objects."""
    return set(map(id, chosen)).issubset(map(id, rows)) or all(row in rows for row in chosen)
