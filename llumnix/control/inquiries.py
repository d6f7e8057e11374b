"""Administrators' questions. The manager keeps no list of requests, so it asks every instance and waits, for
a bounded time, for what they say.

    asking    ListRequests is out; instances that have not answered are ``waiting_for``
    moving    the request was found and its migration ordered; waiting for that to end

Each inquiry is answered exactly once. Called by the global scheduler only.
"""

from dataclasses import dataclass, field

from llumnix.core.messages.control import RequestList, RequestRow, RequestStatus
from llumnix.core.request_names import called

ASK_TIMEOUT_S = 2.0
INQUIRIES_MAX = 1_000


@dataclass(slots=True, eq=False)
class Inquiry:
    """One question. ``request_id`` is as asked, id or name (core/request_names.py). It and ``target_id`` are
    empty when all requests are to be listed."""

    query_id: str
    deadline: float
    waiting_for: dict[str, None]
    request_id: str = ""
    target_id: str = ""
    migration_id: str = ""
    rows: dict[str, tuple[RequestRow, ...]] = field(default_factory=dict)

    def all_rows(self) -> tuple[RequestRow, ...]:
        """Everything said so far, by instance id."""
        return tuple(row for instance_id in sorted(self.rows) for row in self.rows[instance_id])

    def meant(self) -> tuple[str, ...]:
        """The ids of the requests that may be meant, of those heard of so far."""
        return called(self.request_id, (row.request_id for row in self.all_rows()))

    def found(self, request_id: str) -> RequestRow:
        """One of those. While it moves two may name it: the one that decodes it is its owner."""
        named = [row for row in self.all_rows() if row.request_id == request_id]
        return min(named, key=lambda row: row.status is RequestStatus.MIGRATING)


class Inquiries:
    """Open inquiries by query id."""

    def __init__(self, manager_incarnation: str) -> None:
        self._incarnation = manager_incarnation
        self._open: dict[str, Inquiry] = {}
        self._asked = 0

    def full(self) -> bool:
        """Whether no more can be taken."""
        return len(self._open) >= INQUIRIES_MAX

    def new_id(self) -> str:
        """A query id never used before."""
        self._asked += 1
        return f"{self._incarnation}-q{self._asked}"

    def open(self, inquiry: Inquiry) -> None:
        """Begin to wait."""
        self._open[inquiry.query_id] = inquiry

    def close(self, inquiry: Inquiry) -> None:
        """It has been answered."""
        del self._open[inquiry.query_id]

    def heard(self, message: RequestList) -> Inquiry | None:
        """Take in an answer. Returns its inquiry if that is still asking."""
        inquiry = self._open.get(message.query_id)
        if inquiry is None or inquiry.migration_id:
            return None
        inquiry.waiting_for.pop(message.instance_id, None)
        inquiry.rows[message.instance_id] = message.rows
        return inquiry

    def instance_ended(self, instance_id: str) -> list[Inquiry]:
        """The instance will not answer. Returns the inquiries that waited for it."""
        affected = [one for one in self._open.values() if instance_id in one.waiting_for]
        for inquiry in affected:
            del inquiry.waiting_for[instance_id]
        return affected

    def moving(self, migration_id: str) -> Inquiry | None:
        """The inquiry that waits for this migration."""
        return next((one for one in self._open.values() if one.migration_id == migration_id), None)

    def overdue(self, now: float) -> list[Inquiry]:
        """Inquiries that have waited long enough for instances."""
        return [one for one in self._open.values() if not one.migration_id and now >= one.deadline]

    def next_deadline(self) -> float | None:
        """When the next one is overdue."""
        return min((one.deadline for one in self._open.values() if not one.migration_id), default=None)
