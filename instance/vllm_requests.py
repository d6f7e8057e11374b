"""The requests of one vLLM instance: which wait, which vLLM has, what is reported of them. All of the Engine
protocol but for migrations, which vllm_engine.py adds; see there for who decides what.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from llumnix.core.config import EngineConfig, SchedulerConfig, SwapConfig
from llumnix.core.messages.control import KvLayout, RequestRow, RequestStatus, TenantTotals
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.messages.serving import RequestSpec, TokenDelta
from llumnix.core.views import SelectionPolicy
from llumnix.instance.engine import EngineLoad, MovableState, StepResult
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.move_offers import MoveOffers
from llumnix.instance.ranking import Ranking
from llumnix.instance.request import Request
from llumnix.instance.request_table import RequestTable
from llumnix.instance.tenant_counters import TenantCounters
from llumnix.instance.vllm_core import Entered, Produced, VllmCore
from llumnix.instance.vllm_holds import Hold
from llumnix.instance.vllm_staging import Staging
from llumnix.instance.waiting_queue import WaitingQueue
from llumnix.policies.registry import selection_policy

WAITING_CANDIDATES_MAX = 2
STEP_MEAN_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class TakenOut:
    """A request whose migration is not decided yet. It could go on here, with the KV that ``state`` says is
    in the pool and, for what goes before, in these blocks of vLLM."""

    state: MovableState
    hold: Hold


class VllmRequests(RequestTable):
    """See the module. Raises ConfigurationError if vLLM does not start."""

    def __init__(
        self, config: EngineConfig, pool_name: str, selection: SelectionPolicy | None = None
    ) -> None:
        self._core = VllmCore(config, pool_name)
        self._staging = Staging(self._core.exchange)
        self._offers = MoveOffers(selection)
        limits, tenants = self._core.limits, TenantCounters(SchedulerConfig())
        waiting = WaitingQueue(limits.block_size, Ranking(tenants, SwapConfig()))
        super().__init__(limits, config.waiting_max, waiting, tenants)
        self._taken_out: dict[str, TakenOut] = {}
        self._kv_versions = 0
        self._step_s = 0.0
        self._tokens_total = self._preemptions_total = 0

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
                self._drop(request)
                self._ended(request, one.reason)
        for entered in self._core.taken_in():
            self._staging.stop(entered.request.request_id)
        preempted = self._note_preemptions()
        computed = self._core.scheduled_tokens
        if computed:
            weight = STEP_MEAN_WEIGHT if self._step_s else 1.0
            self._step_s += weight * (ended - started - self._step_s)
        steady = not (finished or preempted) and self._all_decode(produced)
        return StepResult(deltas, tuple(finished), preempted, computed, ended - started, steady)

    def _all_decode(self, produced: Sequence[Produced]) -> bool:
        """Whether all that run got tokens (several, if vLLM speculates), and none the first of its answer."""
        running = sum(entered.running for entered in self._entered())
        began = any(one.entered.request.output_len == len(one.tokens) for one in produced)
        return len(produced) == running and not began

    def has_work(self) -> bool:
        """Raises TransportError if vLLM is no more."""
        self._core.check()
        return bool(self._core.entered) or self._admissible()

    def _take_tokens(self, one: Produced) -> TokenDelta:
        request = one.entered.request
        first = request.output_len
        request.tokens.extend(one.tokens)
        request.logprobs.extend(one.logprobs)
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
        aside = sum(not one.state.waiting for one in self._taken_out.values())
        reservations = self._staging.blocks.reservations
        return len(self._core.entered) + aside + reservations < self._core.batch_max

    def _room(self) -> int:
        """Tokens that newcomers may bring: what vLLM has free but for reservations and a little for each
        running request to grow."""
        size = self._limits.block_size
        kept = (self._reserved_blocks + len(self._core.entered)) * size
        return self._core.free_tokens() - kept

    @property
    def _reserved_blocks(self) -> int:
        """For what is coming: in the pool, and what is here already."""
        return self._staging.blocks.reserved_blocks + self._core.arrivals.present_tokens // self.block_size

    # LoRA adapters.

    def objection(self, spec: RequestSpec, *, with_kv: bool) -> str:
        """One that brings KV joins the batch at once, so there must be a slot for its adapter; one that waits
        finds one in its turn."""
        lacking = super().objection(spec, with_kv=with_kv)
        if lacking or not with_kv or self._core.has_slot_for(spec.adapter):
            return lacking
        return f"all of vLLM's slots are taken by other LoRA adapters than {spec.adapter}"

    def _adapters_wanted(self) -> set[str]:
        return {request.adapter for request in self._requests.values() if request.adapter}

    # Where requests are.

    def _enqueue(self, request: Request) -> None:
        self._new_kv(request)
        self._waiting.push(request)

    def _drop(self, request: Request) -> None:
        request_id = request.request_id
        entered = self._core.entered.get(request_id)
        if entered is not None:
            self._core.leave(entered)
        elif request_id in self._taken_out:
            self._core.holds.let_go(self._taken_out.pop(request_id).hold)
        elif request_id in self._waiting:
            self._waiting.remove(request)
        self._staging.stop(request_id)

    # What is going on.

    def load(self) -> EngineLoad:
        size = self._limits.block_size
        running: list[Request] = []
        behind: list[Request] = []
        for entered in self._entered():
            (running if entered.running else behind).append(entered.request)
        waiting_first = behind[0] if behind else self._waiting.head()
        head_blocks = 0 if waiting_first is None else self._waiting.blocks_of(waiting_first)
        used_blocks = -(-self._core.used_tokens // size)
        missing = max(0, head_blocks - (self._limits.capacity_blocks - used_blocks))
        priorities: dict[int, int] = {}
        for request in running:
            priorities[request.execution_priority] = priorities.get(request.execution_priority, 0) + 1
        return EngineLoad(
            capacity_blocks=self._limits.capacity_blocks,
            used_blocks=used_blocks,
            reserved_blocks=self._reserved_blocks,
            head_blocks=head_blocks,
            waiting_blocks=self._waiting.blocks + sum(self._waiting.blocks_of(one) for one in behind),
            running=len(running),
            waiting=len(self._waiting) + len(behind),
            waiting_urgent=(
                self._waiting.urgent + len(behind),  # these are in vLLM's own queue, which nobody overtakes
                self._waiting.urgent_blocks + sum(self._waiting.blocks_of(one) for one in behind),
            ),
            execution_priorities=tuple(sorted(priorities.items())),
            candidates=self._candidates(running, missing),
            step_s=self._step_s,
            tokens_total=self._tokens_total,
            preemptions_total=self._preemptions_total,
            finished_total=self._finished_total,
            policy_fault=self._offers.fault,
            tenants=self._tenants.report(),
            adapters=tuple(sorted(self._core.adapters_loaded() | self._adapters_wanted())),
            kept_tokens_max=self._core.kept_tokens_max,
            head_missing_blocks=missing,
            head_priority=0 if waiting_first is None else waiting_first.scheduling_priority,
            head_arrived_at=0.0 if waiting_first is None else waiting_first.arrived_at,
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
                state = self._taken_out[request.request_id].state
                blocks, status = state.first_block + len(state.blocks), RequestStatus.MIGRATING
            rows.append(replace(request.row(instance_id, now), status=status, blocks=blocks))
        return tuple(rows)

    def _entered(self) -> Iterator[Entered]:
        yield from self._core.entered.values()

    def _candidates(self, running: list[Request], missing: int) -> tuple[MoveCandidate, ...]:
        rows = [self._candidate(request, waiting=False) for request in running]
        rows += [
            self._candidate(request, waiting=True) for request in self._waiting.first(WAITING_CANDIDATES_MAX)
        ]
        return self._offers.offered(rows, missing)

    def _candidate(self, request: Request, *, waiting: bool) -> MoveCandidate:
        return MoveCandidate(
            request.request_id,
            self._waiting.blocks_of(request),
            request.execution_priority,
            waiting,
            len(request.tokens),
            request.output_len,
            request.arrived_at,
            adapter=request.adapter,
            scheduling_priority=request.scheduling_priority,
        )

    def _new_kv(self, request: Request) -> None:
        # Never the same twice on an instance, so a request that left and came back is told from its former
        # self.
        self._kv_versions += 1
        request.kv_version = self._kv_versions
