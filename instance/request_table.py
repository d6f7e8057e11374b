"""The requests an engine holds, by id, and how they come and go: the part of the Engine protocol that is the
same whoever computes. A request comes from a frontend (``submit``) or a migration (``adopt``, the engine's
own, by way of ``_adopt_refusal``); it is refused here, with the reason, before anything of it is kept.

Invariants: a request is in the table from ``_take`` to ``_leaves``; one of a higher epoch replaces an older
self of it; what has ended is remembered for a while. Base of EngineCore and VllmRequests, which say where in
them a request lies.
"""

from abc import ABC, abstractmethod

from llumnix.core.errors import InvariantError
from llumnix.core.messages.serving import FinishReason, RejectCode, RequestSpec, TokenDelta
from llumnix.instance.engine import SubmitRefusal
from llumnix.instance.finished_outputs import FinishedOutputs, last_logprobs
from llumnix.instance.model_limits import ModelLimits
from llumnix.instance.request import Request
from llumnix.instance.tenant_counters import TenantCounters
from llumnix.instance.waiting_queue import WaitingQueue


class RequestTable(ABC):
    """See the module."""

    def __init__(
        self, limits: ModelLimits, waiting_max: int, waiting: WaitingQueue, tenants: TenantCounters
    ) -> None:
        self._limits = limits
        self._waiting_max = waiting_max
        self._waiting = waiting
        self._tenants = tenants
        self._requests: dict[str, Request] = {}
        self._finished = FinishedOutputs()
        self._finished_total = 0

    @abstractmethod
    def _enqueue(self, request: Request) -> None:
        """Put a request that has just come into the queue."""

    @abstractmethod
    def _drop(self, request: Request) -> None:
        """Free all that a request holds, wherever it is."""

    @property
    def block_size(self) -> int:
        return self._limits.block_size

    @property
    def max_model_len(self) -> int:
        return self._limits.max_model_len

    def submit(self, spec: RequestSpec, now: float) -> SubmitRefusal | None:
        refusal = self._refusal(spec) or self._queue_refusal(spec)
        if refusal is None:
            self._enqueue(self._take(spec, now))
        return refusal

    def abort(self, request_id: str, epoch: int) -> bool:
        ended = self._finished.get(request_id)
        if ended is not None and ended.epoch <= epoch:
            self._finished.drop(request_id)
        request = self._requests.get(request_id)
        if request is None or request.epoch > epoch:
            return False
        self._forget(request)
        return True

    def requests_of(self, frontend_address: str) -> tuple[str, ...]:
        held = self._requests.values()
        return tuple(request.request_id for request in held if request.frontend_address == frontend_address)

    def holds(self, request_id: str) -> bool:
        return request_id in self._requests

    def output_since(self, request_id: str, index: int) -> TokenDelta | None:
        request = self._requests.get(request_id)
        if request is not None:
            tokens = request.tokens[request.prompt_len + index :]
            logprobs = last_logprobs(request.logprobs, len(tokens))
            return TokenDelta(request_id, request.epoch, index, tuple(tokens), None, logprobs)
        ended = self._finished.get(request_id)
        return None if ended is None else ended.since(request_id, index)

    def spec_of(self, request_id: str, now: float) -> RequestSpec:
        return self._held(request_id).to_spec(now)

    def objection(self, spec: RequestSpec, *, with_kv: bool) -> str:
        if spec.adapter and spec.adapter not in self._limits.adapters:
            return f"the LoRA adapter {spec.adapter} is not here"
        return ""

    def _held(self, request_id: str) -> Request:
        request = self._requests.get(request_id)
        if request is None:
            raise InvariantError(f"request {request_id} is not held here")
        return request

    def _take(self, spec: RequestSpec, now: float) -> Request:
        """Enter an accepted request into the table, in place of an older self."""
        older = self._requests.get(spec.request_id)
        if older is not None:
            self._forget(older)
        self._finished.drop(spec.request_id)
        request = Request.from_spec(spec, now)
        self._requests[request.request_id] = request
        self._tenants.came(request.tenant)
        return request

    def _forget(self, request: Request) -> None:
        self._drop(request)
        self._leaves(request)

    def _ended(self, request: Request, reason: FinishReason) -> None:
        """A request that holds nothing any more has generated its last token."""
        self._leaves(request)
        self._finished.add(request, reason)
        self._finished_total += 1

    def _leaves(self, request: Request) -> None:
        del self._requests[request.request_id]
        self._tenants.left(request.tenant)

    def _queue_refusal(self, spec: RequestSpec) -> SubmitRefusal | None:
        waiting = len(self._waiting) - (spec.request_id in self._waiting)
        if waiting < self._waiting_max:
            return None
        return SubmitRefusal(RejectCode.QUEUE_FULL, f"{waiting} requests are waiting here already")

    def _refusal(self, spec: RequestSpec) -> SubmitRefusal | None:
        """Why a request cannot be run here at all, ever or in this epoch."""
        reason = self._limits.fault(spec)
        held, ended = self._requests.get(spec.request_id), self._finished.get(spec.request_id)
        if held is not None and held.epoch >= spec.epoch:
            reason = f"request is held here at epoch {held.epoch}, not below {spec.epoch}"
        elif ended is not None and ended.epoch >= spec.epoch:
            reason = f"request has finished here at epoch {ended.epoch}, not below {spec.epoch}"
        if reason is not None:
            return SubmitRefusal(RejectCode.INVALID, reason)
        lacking = self.objection(spec, with_kv=False)
        return SubmitRefusal(RejectCode.NO_ADAPTER, lacking) if lacking else None

    def _adopt_refusal(
        self, spec: RequestSpec, computed_tokens: int, reserved_blocks: int
    ) -> SubmitRefusal | None:
        """Why a request with KV of ``computed_tokens`` tokens in so many blocks (0: none, it waits) cannot be
        taken over."""
        refusal = self._refusal(spec)
        if refusal is not None:
            return refusal
        if computed_tokens == 0:
            return self._queue_refusal(spec)
        objection = self.objection(spec, with_kv=True)
        if objection:
            return SubmitRefusal(RejectCode.NO_ADAPTER, objection)
        room = reserved_blocks * self.block_size
        known = len(spec.prompt_tokens) + len(spec.output_tokens)
        if 0 < computed_tokens < known and computed_tokens <= room:
            return None
        reason = f"KV of {computed_tokens} of {known} tokens cannot lie in room for {room}"
        return SubmitRefusal(RejectCode.INVALID, reason)
