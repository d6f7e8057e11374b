"""Messages between a frontend and the instances that hold its requests.

A delta, made for every token, is a named tuple, several times cheaper to make than a frozen dataclass.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from llumnix.core.sampling import SamplingParams


class FinishReason(StrEnum):
    """Why a request produced its last token. ABORT is never sent to a client that did not ask for it."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class RejectCode(StrEnum):
    """Why an instance will not run a request. Only INVALID is the client's fault; the rest may be retried
    elsewhere. NO_ADAPTER: the instance does not have the request's LoRA adapter."""

    INVALID = "invalid"
    QUEUE_FULL = "queue_full"
    DRAINING = "draining"
    NO_ADAPTER = "no_adapter"


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """All it takes to run a request from anywhere: sent by a frontend to start or to continue it, and by a
    migration's source. ``output_tokens`` are those generated so far (empty for a fresh request), so a
    continuation prefills prompt + output and goes on at the next position. ``waited_s`` is how long it has
    waited already, since clocks of two hosts are never compared. Priorities: higher is more urgent;
    ``scheduling_priority`` orders queues, ``execution_priority`` keeps room free beside it. ``adapter`` is
    the name of the LoRA adapter that computes it, empty for the model alone.
    """

    request_id: str
    epoch: int
    frontend_address: str
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    sampling: SamplingParams
    scheduling_priority: int = 0
    execution_priority: int = 0
    tenant: str = ""
    waited_s: float = 0.0
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Submit:
    """Frontend to instance: run this request."""

    spec: RequestSpec


@dataclass(frozen=True, slots=True)
class Abort:
    """Frontend to instance: stop this request and free its blocks, if you hold it at ``epoch`` or below."""

    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of one chosen token and of the likeliest alternatives, as (token, logprob), best
    first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenDelta(NamedTuple):
    """New tokens of one request. ``first_index`` counts from the request's first generated token.
    ``logprobs`` is empty or as long as ``tokens``. The last delta carries ``finish_reason`` (and may carry no
    token)."""

    request_id: str
    epoch: int
    first_index: int
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Instance to frontend: everything one step produced for that frontend."""

    instance_id: str
    deltas: tuple[TokenDelta, ...]


@dataclass(frozen=True, slots=True)
class Rejected:
    """Instance to frontend: this request was not taken, and nothing of it was kept."""

    instance_id: str
    request_id: str
    epoch: int
    code: RejectCode
    reason: str


@dataclass(frozen=True, slots=True)
class Moved:
    """Old owner to frontend, once a migration is committed: ``instance_id`` owns the request from ``epoch``
    on."""

    request_id: str
    epoch: int
    instance_id: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Frontend to instance: do you hold these requests? Pairs are (request, index of the next token
    wanted)."""

    frontend_address: str
    requests: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class ProbeReply:
    """Instance to frontend: ``unknown`` are held neither running, waiting nor lately finished. Tokens that
    the frontend lacked follow in a TokenBatch of their own."""

    instance_id: str
    unknown: tuple[str, ...]
