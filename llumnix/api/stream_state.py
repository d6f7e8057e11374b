"""One request as its frontend sees it, and what the stream table hands out. Used by streams.py only, apart
from the effects, which whoever drives the table carries out.

    phase      owner            what its deadline means
    PLACING    nobody           the manager did not answer: place by our own view
    BACKOFF    nobody           ask for a place again
    STREAMING  ``owner_id``     no news for long: probe the owner
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import NamedTuple

from llumnix.api.backend import FailKind, StreamCall
from llumnix.api.kept_prefixes import KeptPrefixes
from llumnix.core.admin import MoveSeen
from llumnix.core.effects import Send
from llumnix.core.epochs import HOP_BITS
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import Place
from llumnix.core.messages.serving import FinishReason, RequestSpec, TokenLogprob

GAP_WEIGHT = 0.2  # of the newest gap in the mean
RETRY_MIN_S, RETRY_MAX_S, RETRY_DOUBLINGS = 0.05, 2.0, 6


class Deliver(NamedTuple):
    """Give these tokens to the client: the next ones in order, never one twice. With ``finish_reason`` the
    stream is over and already forgotten."""

    request_id: str
    first_index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Fail:
    """Tell the client that its request failed. The stream is over and already forgotten."""

    request_id: str
    kind: FailKind
    reason: str
    retry_after_s: float


Effect = Send | Deliver | Fail


class Phase(StrEnum):
    PLACING = "placing"
    BACKOFF = "backoff"
    STREAMING = "streaming"


@dataclass(slots=True, eq=False)
class Stream:
    """Mutable state of one request in flight.

    ``tokens`` are those given to the client. ``must_continue``: an instance had taken it, so a lack of room
    may no longer be shown to the client. ``troubled_at`` is when it lost its owner, until tokens come
    again. ``refusal``: what the instance that refused it last said. ``asked``: a probe is out whose answer
    may still say unknown. ``alarm`` is the earliest timer entry that will look at it. ``fed_*``: when, by
    whom and at which epoch tokens came last; ``usual_gap_s``: the recent mean time between them.
    """

    call: StreamCall
    opened_at: float
    epoch: int
    phase: Phase = Phase.PLACING
    tokens: list[int] = field(default_factory=list)
    owner_id: str = ""
    owner_incarnation: str = ""
    owner_address: str = ""
    exclude: tuple[str, ...] = ()
    tries: int = 0
    must_continue: bool = False
    troubled_at: float | None = None
    deadline: float = inf
    alarm: float = inf
    asked: bool = False
    probed_at: float = -inf
    unanswered: int = 0
    unknown: int = 0
    invalid_reason: str = ""
    refusal: str = ""
    fed_at: float = -inf
    fed_by: str = ""
    fed_epoch: int = 0
    usual_gap_s: float = 0.0

    def feed(self, tokens: tuple[int, ...], now: float) -> MoveSeen | None:
        """Take in tokens of the owner; tells if they are its first after a migration."""
        self.tokens += tokens
        gap_s, moved = now - self.fed_at, None
        if self.fed_epoch == self.epoch:
            weight = GAP_WEIGHT if self.usual_gap_s else 1.0
            self.usual_gap_s += weight * (gap_s - self.usual_gap_s)
        elif self.fed_epoch >> HOP_BITS == self.epoch >> HOP_BITS:
            call, usual_ms = self.call, self.usual_gap_s * 1e3
            moved = MoveSeen(call.request_id, self.fed_by, self.owner_id, gap_s * 1e3, usual_ms)
        self.fed_at, self.fed_by, self.fed_epoch = now, self.owner_id, self.epoch
        return moved

    def spec(self, frontend_address: str, now: float) -> RequestSpec:
        """All an instance needs to start the request, or to go on after the tokens already delivered."""
        call = self.call
        return RequestSpec(
            request_id=call.request_id,
            epoch=self.epoch,
            frontend_address=frontend_address,
            prompt_tokens=call.prompt_tokens,
            output_tokens=tuple(self.tokens),
            sampling=call.sampling,
            scheduling_priority=call.scheduling_priority,
            execution_priority=call.execution_priority,
            tenant=call.tenant,
            waited_s=max(0.0, now - self.opened_at),
            adapter=call.adapter,
        )

    def place(self, frontend_address: str, kept: KeptPrefixes) -> Place:
        """The question to the manager where to run what is left of the request."""
        call = self.call
        return Place(
            frontend_address=frontend_address,
            request_id=call.request_id,
            prompt_tokens=len(call.prompt_tokens) + len(self.tokens),
            max_tokens=call.sampling.max_tokens - len(self.tokens),
            scheduling_priority=call.scheduling_priority,
            execution_priority=call.execution_priority,
            tenant=call.tenant,
            exclude=self.exclude,
            adapter=call.adapter,
            kept=kept.find(call, self.tokens),
        )

    def retry_s(self, at_least: float = 0.0) -> float:
        """How long to wait before the next try: longer each time, and as long as was asked for, within
        RETRY_MAX_S."""
        own = RETRY_MIN_S * 2.0 ** min(self.tries, RETRY_DOUBLINGS)
        return min(max(at_least, own), RETRY_MAX_S)

    def begin(self) -> None:
        """Its owner decodes it: what went before is of no matter any more, and it will be seen through."""
        self.exclude, self.tries, self.troubled_at, self.must_continue = (), 0, None, True
        self.refusal = ""

    def settle(self) -> None:
        """Its owner has just shown that it holds the request: earlier doubts are void."""
        self.asked = False
        self.unanswered = 0
        self.unknown = 0
        self.invalid_reason = ""


@dataclass(slots=True)
class StreamStats:
    """What the table counted since it began. ``placed_alone``: without the manager. ``stale_deltas`` came
    from an instance that no longer owned the request, ``trimmed_tokens`` had been delivered before, ``gaps``
    were asked for."""

    opened: int = 0
    finished: int = 0
    failed: int = 0
    aborted: int = 0
    continued: int = 0
    placed_alone: int = 0
    rejected: int = 0
    stale_deltas: int = 0
    trimmed_tokens: int = 0
    gaps: int = 0
    tokens: int = 0


def check_streams(streams: Mapping[str, Stream], held: Mapping[str, int], stats: StreamStats) -> None:
    """Raise InvariantError unless each stream is in a state its phase allows, has an alarm, and is counted
    once."""
    counted: dict[str, int] = {}
    for request_id, stream in streams.items():
        streaming = stream.phase is Phase.STREAMING
        if streaming != bool(stream.owner_id):
            raise InvariantError(f"{request_id} is {stream.phase} with owner {stream.owner_id!r}")
        if stream.alarm == inf or (not streaming and stream.alarm > stream.deadline):
            raise InvariantError(f"{request_id} has no alarm for its deadline")
        if len(stream.tokens) > stream.call.sampling.max_tokens:
            raise InvariantError(f"{request_id} has more tokens than it asked for")
        if streaming:
            counted[stream.owner_id] = counted.get(stream.owner_id, 0) + 1
    if counted != held:
        raise InvariantError(f"streams per instance: counted {counted}, kept {held}")
    closed = stats.finished + stats.aborted
    if closed + len(streams) > stats.opened:
        raise InvariantError(f"{stats.opened} opened, but {closed} closed and {len(streams)} open")
