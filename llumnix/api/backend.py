"""What the HTTP layer needs of the rest of the system, and nothing more.

The routes talk to a ``Backend``; the runtime implements it over the bus and the manager, tests over an engine
in process. So everything a client can see is testable on one event loop without a cluster.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from llumnix.core.admin import (
    ClusterSummary,
    DecisionRow,
    Event,
    InstanceRow,
    MigrationResult,
    MoveSeen,
    PolicyState,
    Refusal,
)
from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.errors import LlumnixError
from llumnix.core.messages.control import InstanceRole, RequestRow
from llumnix.core.messages.serving import FinishReason, TokenLogprob
from llumnix.core.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model a cluster serves. ``tokenizer_folder`` is empty for the simulated engine without a model,
    which is read and written with the built-in byte tokenizer. ``vocab_size`` bounds token ids in prompts.
    ``adapters`` are the LoRA adapters, each offered as a model of its own. ``greedy_only``: nothing that
    samples or has penalties is served."""

    name: str
    max_model_len: int
    tokenizer_folder: str
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    adapters: tuple[str, ...] = ()
    greedy_only: bool = False


@dataclass(frozen=True, slots=True)
class StreamCall:
    """One sequence to generate. ``request_id`` is that of no other in the whole cluster while it lasts: see
    core/request_names.py. Priorities: higher is more urgent. ``adapter`` is a LoRA adapter's name, empty for
    the model alone. ``first_epoch`` must be higher where the id may have been used before."""

    request_id: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    scheduling_priority: int = 0
    execution_priority: int = 0
    tenant: str = ""
    adapter: str = ""
    first_epoch: int = FIRST_EPOCH


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """New tokens of a stream, in order and without gap. ``logprobs`` is empty or as long as ``tokens``. A
    consumer that lags gets several steps' tokens as one chunk. The last chunk carries ``finish_reason``."""

    first_index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


class FailKind(StrEnum):
    """Why a stream ended without finishing. INVALID is the client's fault; TOO_MANY: this frontend is full;
    OVERLOADED: no instance takes it now; LOST: it could not be continued after its instance failed."""

    INVALID = "invalid"
    TOO_MANY = "too_many"
    OVERLOADED = "overloaded"
    LOST = "lost"


class StreamFailed(LlumnixError):
    """A stream ended without a finish reason. Tokens received before it remain valid."""

    def __init__(self, kind: FailKind, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.retry_after_s = retry_after_s


class ManagerAway(LlumnixError):
    """The manager does not answer, and why: it is being restarted, or hangs. Serving goes on."""


class TokenStream(Protocol):
    """One sequence being generated. Iterating ends after the chunk with the finish reason; StreamFailed
    otherwise. Memory stays bounded by the sequence's own length however slow the consumer is."""

    def __aiter__(self) -> AsyncIterator[TokenChunk]: ...

    async def cancel(self) -> None:
        """Stop generating and free the request wherever it is. Does nothing once the stream has ended."""
        ...


class Admin(Protocol):
    """Orders and questions to the manager. Each raises ManagerAway while it does not answer."""

    async def status(self) -> ClusterSummary: ...

    async def instances(self) -> tuple[InstanceRow, ...]: ...

    async def requests(self) -> tuple[RequestRow, ...]: ...

    async def migrate(self, request_id: str, target_id: str) -> MigrationResult | Refusal: ...

    async def drain(self, instance_id: str) -> InstanceRow | Refusal: ...

    async def resume(self, instance_id: str) -> InstanceRow | Refusal: ...

    async def set_role(self, instance_id: str, role: InstanceRole) -> InstanceRow | Refusal: ...

    async def scale(self, instances: int) -> ClusterSummary | Refusal: ...

    async def events(self, after: int, limit: int) -> tuple[Event, ...]: ...

    async def policies(self) -> PolicyState: ...

    async def set_policy(self, kind: str, name: str, settings: dict[str, str]) -> PolicyState | Refusal: ...

    async def explain(self, request_id: str) -> tuple[DecisionRow, ...] | Refusal: ...


class Backend(Protocol):
    """The cluster as one frontend sees it."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def ready(self) -> bool:
        """Whether at least one instance can take requests."""
        ...

    @property
    def admin(self) -> Admin: ...

    @property
    def moves(self) -> tuple[MoveSeen, ...]:
        """The latest migrations as this frontend's clients felt them, oldest first."""
        ...

    def open(self, call: StreamCall) -> TokenStream:
        """Begin a sequence. Never blocks; a refusal surfaces as StreamFailed when the stream is read."""
        ...
