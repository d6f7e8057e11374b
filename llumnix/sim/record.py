"""What clients saw, request by request, in bounded memory.

A request in flight has a Record; once it is over it is a row of numbers. Times are those at which tokens
reached the client. Filled by the simulated frontends, or, where whole stretches of steps are done at once, by
the instances that make the tokens.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

COLUMNS = (
    *("number", "arrived_s", "first_token_s", "finished_s", "tokens", "longest_gap_s"),
    *("preemptions", "preemption_loss_s", "migrations", "high", "prompt_tokens", "failed"),
)
"""One row per request that is over. ``longest_gap_s`` between two tokens; ``preemption_loss_s`` from the
moments its KV was given up to its next token each time; ``failed`` 1: its client got an error."""


@dataclass(slots=True, eq=False)
class Record:
    """A request in flight. ``preempted_at`` below 0: it has its KV, or never had any."""

    number: int
    arrived_s: float
    prompt_tokens: int
    high: bool
    tenant: str = ""
    first_token_s: float = -1.0
    last_token_s: float = -1.0
    tokens: int = 0
    longest_gap_s: float = 0.0
    preemptions: int = 0
    preempted_at: float = -1.0
    preemption_loss_s: float = 0.0
    migrations: int = 0


@dataclass(slots=True)
class Recorder:
    """See the module. ``instances`` of finished requests are not kept: what moves is counted."""

    live: dict[str, Record] = field(default_factory=dict)
    columns: dict[str, "array[float]"] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    tenants: dict[str, int] = field(default_factory=dict)
    opened: int = 0
    finished: int = 0
    failed: int = 0
    tokens: int = 0

    def open(self, request_id: str, record: Record) -> None:
        """A client sends a request."""
        self.live[request_id] = record
        self.opened += 1

    def token(self, request_id: str, at: float) -> None:
        """One more token has come."""
        self.stretch((request_id,), at, at, 1, 0.0)

    def stretch(
        self, request_ids: Iterable[str], first_at: float, last_at: float, count: int, longest_s: float
    ) -> None:
        """``count`` tokens have come for each of these, the first and last at these times and at most
        ``longest_s`` apart."""
        for request_id in request_ids:
            record = self.live.get(request_id)
            if record is None:
                continue
            if record.tokens:
                gap = first_at - record.last_token_s
                if longest_s > gap:
                    gap = longest_s
                if gap > record.longest_gap_s:
                    record.longest_gap_s = gap
            else:
                record.first_token_s = first_at
                record.longest_gap_s = longest_s
            record.last_token_s = last_at
            record.tokens += count
            if record.preempted_at >= 0.0:
                record.preemption_loss_s += first_at - record.preempted_at
                record.preempted_at = -1.0

    def preempted(self, request_id: str, at: float) -> None:
        """An instance gave up the KV of a request."""
        record = self.live.get(request_id)
        if record is not None:
            record.preemptions += 1
            if record.preempted_at < 0.0:
                record.preempted_at = at

    def moved(self, request_id: str) -> None:
        """A migration of a request was committed."""
        record = self.live.get(request_id)
        if record is not None:
            record.migrations += 1

    def close(self, request_id: str, at: float, *, failed: bool) -> Record:
        """A request is over."""
        record = self.live.pop(request_id)
        self.finished += not failed
        self.failed += failed
        self.tokens += record.tokens
        if record.tenant:
            self.tenants[record.tenant] = self.tenants.get(record.tenant, 0) + record.tokens
        row = (
            *(record.number, record.arrived_s, record.first_token_s, at, record.tokens, record.longest_gap_s),
            *(record.preemptions, record.preemption_loss_s, record.migrations, record.high),
            *(record.prompt_tokens, failed),
        )
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        return record
