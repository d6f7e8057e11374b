"""The engine protocol: what the agent, the runtime and the simulator need of an engine, whichever it is.

An engine belongs to one thread. The agent calls it between steps only, so nothing here is ever called while a
step computes. Implementations: EngineCore with an executor (torch or simulated), and the vLLM adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import RequestRow, TenantTotals
from llumnix.core.messages.load import MoveCandidate, Shortage, SwapTotals, TenantService
from llumnix.core.messages.serving import RejectCode, RequestSpec, TokenDelta
from llumnix.migration.transports.base import ReaderFactory


@dataclass(frozen=True, slots=True)
class SubmitRefusal:
    """Why a request was not taken; nothing of it was kept."""

    code: RejectCode
    reason: str


class EngineLoad(NamedTuple):
    """Load as in the LoadReport message; ``step_s`` is a recent mean, 0.0 before the first step."""

    capacity_blocks: int
    used_blocks: int
    reserved_blocks: int
    head_blocks: int
    waiting_blocks: int
    running: int
    waiting: int
    execution_priorities: tuple[tuple[int, int], ...]
    candidates: tuple[MoveCandidate, ...]
    step_s: float
    tokens_total: int
    preemptions_total: int
    finished_total: int
    policy_fault: str = ""
    tenants: tuple[TenantService, ...] = ()
    swap: SwapTotals | None = None
    shortage: Shortage | None = None
    waiting_urgent: tuple[int, int] = (0, 0)
    adapters: tuple[str, ...] = ()
    kept_tokens_max: int = 0
    head_missing_blocks: int = 0
    head_priority: int = 0
    head_arrived_at: float = 0.0


class StepResult(NamedTuple):
    """What one step produced: deltas by frontend address, requests that finished, requests whose KV was given
    up. ``tokens`` computed. ``duration_s`` of the step. An empty step has computed 0 tokens. ``steady``:
    every running request got its next token and nothing else happened."""

    deltas: dict[str, list[TokenDelta]]
    finished: tuple[str, ...]
    preempted: tuple[str, ...]
    tokens: int
    duration_s: float
    steady: bool = False


@dataclass(frozen=True, slots=True)
class MovableState:
    """What a migration's source needs to know between steps. ``waiting``: no KV, in the queue. ``swapped``:
    in the queue, and ``blocks`` are those of host memory. ``blocks`` are for the KV of ``computed_tokens``;
    the first ``full_blocks`` of the request hold it and never change while ``kv_version`` stays as it is.
    They begin with its block ``first_block``: those before it need not be read, since the target has them.
    ``lagging``: more blocks will be counted after a later step, once they have been copied to where peers
    read them. ``known_tokens`` counts prompt + output. ``recompute_s`` is what computing a swapped one's KV
    again would take (0.0: not known). ``hindrance``: why what it has cannot be read; empty if it can."""

    waiting: bool
    blocks: tuple[int, ...]
    full_blocks: int
    computed_tokens: int
    known_tokens: int
    kv_version: int
    lagging: bool = False
    swapped: bool = False
    recompute_s: float = 0.0
    first_block: int = 0
    hindrance: str = ""


class Engine(Protocol):
    """See the module. Methods that take ``request_id`` treat an unknown one as an answer (None, False), not
    an error, except where a method says that the request must be there (InvariantError otherwise)."""

    @property
    def block_size(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    def submit(self, spec: RequestSpec, now: float) -> SubmitRefusal | None:
        """Queue a request. A spec with a higher epoch replaces one held under the same id; a lower or equal
        one is refused as INVALID."""
        ...

    def abort(self, request_id: str, epoch: int) -> bool:
        """Drop a request held at ``epoch`` or below and free its blocks at once. False: not held."""
        ...

    def requests_of(self, frontend_address: str) -> tuple[str, ...]:
        """Requests held for this frontend."""
        ...

    def holds(self, request_id: str) -> bool:
        """Whether the request is waiting, running or taken out for a commit here."""
        ...

    def has_work(self) -> bool:
        """Whether a step would do something."""
        ...

    def load(self) -> EngineLoad: ...

    def configure(self, config: SchedulerConfig) -> None:
        """Go by these settings of the scheduler from now on: what to offer for moves, shares of tenants.
        Raises ConfigurationError if they cannot hold here; then nothing has changed."""
        ...

    def hear_tenants(self, totals: TenantTotals) -> None:
        """What the cluster's other instances did for tenants."""
        ...

    def rows(self, instance_id: str, now: float) -> tuple[RequestRow, ...]:
        """Every request held, running ones first."""
        ...

    def output_since(self, request_id: str, index: int) -> TokenDelta | None:
        """Tokens of a held or lately finished request from output ``index`` on (with its finish reason if it
        has ended). None: unknown here."""
        ...

    def objection(self, spec: RequestSpec, *, with_kv: bool) -> str:
        """Why the LoRA adapter of a request of another instance, with KV or waiting, keeps it from going on
        here, however much room there is; empty if it can."""
        ...

    # A migration's source.
    def begin_move(self, request_id: str, present_blocks: int = 0) -> str:
        """A target has room for this held request, and has the KV of its first ``present_blocks`` blocks, all
        full: see to it that peers can read the rest. Returns why that cannot be; empty if it can."""
        ...

    def end_move(self, request_id: str) -> None:
        """A migration of this request has ended, however it ended."""
        ...

    def movable(self, request_id: str) -> MovableState | None:
        """None: not held, or already taken out."""
        ...

    def spec_of(self, request_id: str, now: float) -> RequestSpec:
        """The request as it would travel now. It must be held."""
        ...

    def take_out(self, request_id: str) -> MovableState:
        """Remove a held request from queue or batch, keeping its blocks, those of host memory too: nothing
        about it changes until it is put back or released. It must be held and not taken out."""
        ...

    def put_back(self, request_id: str, epoch: int) -> None:
        """Continue a request that was taken out, as its owner at ``epoch``."""
        ...

    def release(self, request_id: str) -> None:
        """Forget a request that was taken out: it lives elsewhere now. Frees its blocks."""
        ...

    # A migration's target.
    def readers(self, readers: ReaderFactory) -> ReaderFactory:
        """What this instance reads KV with, made of what it would else read with: an engine that keeps its
        KV elsewhere goes on from there. Reads run on copy threads."""
        ...

    def keep_present(self, migration_id: str, spec: RequestSpec, blocks_max: int) -> int:
        """How many of the request's leading blocks, all full, at most ``blocks_max``, have their KV here.
        Asked once, right before the reservation is made, of which they are part; it is kept until the
        reservation is adopted or cancelled."""
        ...

    def reserve(self, migration_id: str, blocks: int) -> tuple[int, ...] | None:
        """Make the reservation hold exactly ``blocks`` blocks in total, new or grown (never shrunk), and
        return in order the ids of all but those that are present, into which nothing is read. None: no room,
        and the reservation is as it was."""
        ...

    def cancel_reservation(self, migration_id: str) -> None:
        """Free a reservation's blocks. Unknown ids are ignored."""
        ...

    def adopt(
        self, migration_id: str, spec: RequestSpec, computed_tokens: int, now: float
    ) -> SubmitRefusal | None:
        """Turn a reservation whose blocks hold the KV of ``computed_tokens`` into a running request (or, with
        0, into a waiting one) that joins the next step. A refusal leaves the reservation as it was."""
        ...


class KvInPlace:
    """The part of an engine whose KV lies where peers read it, and where it is read into: nothing needs to be
    done for a move."""

    def readers(self, readers: ReaderFactory) -> ReaderFactory:
        return readers

    def begin_move(self, request_id: str, present_blocks: int = 0) -> str:
        return ""

    def end_move(self, request_id: str) -> None: ...


class SteppedEngine(Engine, Protocol):
    """An engine with its model: what an engine thread runs."""

    def step(self, clock: Callable[[], float]) -> StepResult:
        """Schedule, compute and take in one step; ``clock`` gives seconds of any fixed origin. Whatever it
        raises, no token of the step was taken in."""
        ...
