"""What the global scheduler returns beside ``Send``: answers to administrators, and what is worth telling
them."""

from dataclasses import dataclass, field

from llumnix.core.admin import MigrationResult, Refusal
from llumnix.core.effects import Send
from llumnix.core.messages.control import RequestRow


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to a question asked earlier; there is exactly one for each query id."""

    query_id: str
    value: tuple[RequestRow, ...] | MigrationResult | Refusal


@dataclass(frozen=True, slots=True)
class Logged:
    """One thing that happened, for the event log."""

    kind: str
    text: str
    fields: dict[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScaleTo:
    """Have so many instances that serve or will: take back those being emptied, then start more; or drain and
    stop those with the fewest requests."""

    instances: int
    reason: str


Effect = Send | Answered | Logged | ScaleTo
