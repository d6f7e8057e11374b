"""The requests of one vLLM instance: which wait, which vLLM has, what is reported of them. All of the Engine
protocol but for migrations, which vllm_engine.py adds; see there for who decides what.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from llumnix.core.config import EngineConfig, SchedulerConfig, SwapConfig
from llumnix.core.messages.control import KvLayout, MoveCandidate, RequestRow, RequestStatus, TenantTotals
from llumnix.core.messages.serving import RejectCode, RequestSpec, TokenDelta
from llumnix.core.views import SelectionPolicy
from llumnix.instance.engine import EngineLoad, StepResult, SubmitRefusal
from llumnix.instance.finished_outputs import FinishedOutputs
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.move_offers import MoveOffers
from llumnix.instance.ranking import Ranking
from llumnix.instance.request import Request
from llumnix.instance.tenant_counters import TenantCounters
from llumnix.instance.vllm_core import Entered, Produced, VllmCore
from llumnix.instance.vllm_staging import Staging
from llumnix.instance.waiting_queue import WaitingQueue
from llumnix.policies.registry import selection_policy

CANDIDATES_MAX = 4
WAITING_CANDIDATES_MAX = 2
STEP_MEAN_WEIGHT = 0.1


class VllmRequests:
    """See the module. Raises ConfigurationError if vLLM does not start."""

    def __init__(
        self, config: EngineConfig, pool_name: str, selection: SelectionPolicy | None = None
    ) -> None:
        self._core = VllmCore(config, pool_name)
        self._limits = self._core.limits
        self._staging = Staging(self._core.exchange)
        self._waiting_max = config.waiting_max
        self._offers = MoveOffers(selection)
        self._tenants = TenantCounters(SchedulerConfig())
        self._waiting = WaitingQueue(self._limits.block_size, Ranking(self._tenants, SwapConfig()))
        self._requests: dict[str, Request] = {}
        self._taken_out: dict[str, tuple[int, ...]] = {}
        self._finished = FinishedOutputs()
        self._kv_versions = 0
        self._step_s = 0.0
        self._tokens_total = self._preemptions_total = self._finished_total = 0

    @property
    def pool(self) -> KvPool:
        """The memory that peers read."""
        return self._core.exchange.pool

    @property
    def host_pool(self) -> KvPool | None:
        """None: vLLM swaps by itself, if at all."""
        return None

    @property
    def kv_layout(self) -> KvLayout:
        """Of the pool."""
        return self.pool.layout

    @property
    def block_size(self) -> int:
        return self._limits.block_size

    @property
    def max_model_len(self) -> int:
        return self._limits.max_model_len

    def close(self) -> None:
        """End copying, vLLM and the pool."""
        self._staging.close()
        self._core.close()

    # Steps.

    def step(self, clock: Callable[[], float]) -> StepResult:
        """Admit, have vLLM do one step, and take in what it produced."""
        self._admit()
        started = clock()
        produced = self._core.step()
        ended = clock()
        deltas: dict[str, list[TokenDelta]] = {}
        finished: list[str] = []
        for one in produced:
            request = one.entered.request
            deltas.setdefault(request.frontend_address, []).append(self._take_tokens(one))
            if one.reason is not None:
                finished.append(request.request_id)
                self._forget(request)
                self._finished.add(request, one.reason)
                self._finished_total += 1
        for entered in self._core.taken_in():
            self._staging.stop(entered.request.request_id)
        preempted = self._note_preemptions()
        computed = self._core.scheduled_tokens
        if computed:
            weight = STEP_MEAN_WEIGHT if self._step_s else 1.0
            self._step_s += weight * (ended - started - self._step_s)
        steady = computed == len(produced) and not (finished or preempted)
        return StepResult(deltas, tuple(finished), preempted, computed, ended - started, steady)

    def has_work(self) -> bool:
        return bool(self._core.entered) or self._admissible()

    def _take_tokens(self, one: Produced) -> TokenDelta:
        request = one.entered.request
        first = request.output_len
        request.tokens.extend(one.tokens)
        self._tenants.generated(request.tenant, len(one.tokens))
        self._tokens_total += len(one.tokens)
        return TokenDelta(request.request_id, request.epoch, first, one.tokens, one.reason, one.logprobs)

    def _note_preemptions(self) -> tuple[str, ...]:
        preempted = self._core.preempted()
        for entered in preempted:
            entered.request.preemptions += 1
            self._new_kv(entered.request)
        self._preemptions_total += len(preempted)
        return tuple(entered.request.request_id for entered in preempted)

    def _admit(self) -> None:
        while self._admissible():
            head = self._waiting.head()
            assert head is not None
            self._waiting.remove(head)
            if not head.charged:
                head.charged = True
                self._tenants.admitted(head.tenant, head.prompt_len)
            self._core.enter(head)

    def _admissible(self) -> bool:
        """Whether the head of the queue fits. Nothing overtakes what vLLM has preempted."""
        head = self._waiting.head()
        if head is None or any(entered.preemptions and not entered.running for entered in self._entered()):
            return False
        return self._has_slot() and self._core.rounded(len(head.tokens)) <= self._room()

    def _has_slot(self) -> bool:
        aside = sum(1 for blocks in self._taken_out.values() if blocks)
        reservations = self._staging.blocks.reservations
        return len(self._core.entered) + aside + reservations < self._core.batch_max

    def _room(self) -> int:
        """Tokens that newcomers may bring: what vLLM has free but for reservations and a little for each
        running request to grow."""
        size = self._limits.block_size
        kept = (self._staging.blocks.reserved_blocks + len(self._core.entered)) * size
        return self._core.free_tokens() - kept

    # Requests in and out.

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

    def _enqueue(self, request: Request) -> None:
        self._new_kv(request)
        self._waiting.push(request)

    def _forget(self, request: Request) -> None:
        """Drop a request wherever it is."""
        request_id = request.request_id
        del self._requests[request_id]
        entered = self._core.entered.get(request_id)
        if entered is not None:
            self._core.leave(entered)
        elif self._taken_out.pop(request_id, None) is None and request_id in self._waiting:
            self._waiting.remove(request)
        self._staging.stop(request_id)
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
        return None if reason is None else SubmitRefusal(RejectCode.INVALID, reason)

    # What is going on.

    def load(self) -> EngineLoad:
        size = self._limits.block_size
        running: list[Request] = []
        behind: list[Request] = []
        for entered in self._entered():
            (running if entered.running else behind).append(entered.request)
        waiting_first = behind[0] if behind else self._waiting.head()
        priorities: dict[int, int] = {}
        for request in running:
            priorities[request.execution_priority] = priorities.get(request.execution_priority, 0) + 1
        return EngineLoad(
            capacity_blocks=self._limits.capacity_blocks,
            used_blocks=-(-self._core.used_tokens // size),
            reserved_blocks=self._staging.blocks.reserved_blocks,
            head_blocks=0 if waiting_first is None else self._waiting.blocks_of(waiting_first),
            waiting_blocks=self._waiting.blocks + sum(self._waiting.blocks_of(one) for one in behind),
            running=len(running),
            waiting=len(self._waiting) + len(behind),
            waiting_urgent=(
                self._waiting.urgent + len(behind),  # these are in vLLM's own queue, which nobody overtakes
                self._waiting.urgent_blocks + sum(self._waiting.blocks_of(one) for one in behind),
            ),
            execution_priorities=tuple(sorted(priorities.items())),
            candidates=self._candidates(running),
            step_s=self._step_s,
            tokens_total=self._tokens_total,
            preemptions_total=self._preemptions_total,
            finished_total=self._finished_total,
            policy_fault=self._offers.fault,
            tenants=self._tenants.report(),
        )

    def configure(self, config: SchedulerConfig) -> None:
        self._offers.use(selection_policy(config))
        self._tenants.configure(config)

    def hear_tenants(self, totals: TenantTotals) -> None:
        self._tenants.hear(totals.offsets)

    def rows(self, instance_id: str, now: float) -> tuple[RequestRow, ...]:
        rows = []
        for request in sorted(self._requests.values(), key=lambda one: one.request_id in self._waiting):
            entered = self._core.entered.get(request.request_id)
            blocks, status = 0, RequestStatus.WAITING
            if entered is not None and entered.running:
                blocks, status = self._waiting.blocks_of(request), RequestStatus.RUNNING
            elif request.request_id in self._taken_out:
                blocks, status = len(self._taken_out[request.request_id]), RequestStatus.MIGRATING
            rows.append(replace(request.row(instance_id, now), status=status, blocks=blocks))
        return tuple(rows)

    def output_since(self, request_id: str, index: int) -> TokenDelta | None:
        request = self._requests.get(request_id)
        if request is not None:
            tokens = tuple(request.tokens[request.prompt_len + index :])
            return TokenDelta(request_id, request.epoch, index, tokens)
        ended = self._finished.get(request_id)
        if ended is None:
            return None
        return TokenDelta(request_id, ended.epoch, index, tuple(ended.tokens[index:]), ended.reason)

    def _entered(self) -> Iterator[Entered]:
        yield from self._core.entered.values()

    def _candidates(self, running: list[Request]) -> tuple[MoveCandidate, ...]:
        rows = [self._candidate(request, waiting=False) for request in running]
        rows += [
            self._candidate(request, waiting=True) for request in self._waiting.first(WAITING_CANDIDATES_MAX)
        ]
        return self._offers.best(rows, CANDIDATES_MAX)

    def _candidate(self, request: Request, *, waiting: bool) -> MoveCandidate:
        return MoveCandidate(
            request.request_id,
            self._waiting.blocks_of(request),
            request.execution_priority,
            waiting,
            len(request.tokens),
            request.output_len,
            request.arrived_at,
        )

    def _new_kv(self, request: Request) -> None:
        # Never the same twice on an instance, so a request that left and came back is told from its former
        # self.
        self._kv_versions += 1
        request.kv_version = self._kv_versions
