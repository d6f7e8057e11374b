"""The engine without the model: every decision of one instance about its requests, as plain code.

``schedule`` says what the next step computes, an executor computes it, ``apply`` takes in what was sampled
and returns what came of it. Nothing here reads a clock, computes or waits, so the engine thread and the
simulator drive the same class. Implements the Engine protocol (engine.py), which says when its methods may be
called.

Invariants: a request is held in one place only (local_scheduler.py); a token is reported once, when it is
sampled; a stop or end token is reported like any other and ends the request with STOP.
"""

from collections.abc import Collection, Sequence

from llumnix.core.config import EngineConfig, SchedulerConfig, SwapConfig
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import RequestRow, TenantTotals
from llumnix.core.messages.serving import FinishReason, RequestSpec, TokenDelta
from llumnix.core.views import SelectionPolicy
from llumnix.instance.batch import QuietStretch
from llumnix.instance.block_manager import BlockManager
from llumnix.instance.engine import EngineLoad, KvInPlace, MovableState, StepResult, SubmitRefusal
from llumnix.instance.executor import SampledToken, StepPlan
from llumnix.instance.local_scheduler import LocalScheduler, Sample
from llumnix.instance.model_limits import ModelLimits
from llumnix.instance.movable import host_blocks, movable_state
from llumnix.instance.move_offers import MoveOffers
from llumnix.instance.request import Request
from llumnix.instance.request_table import RequestTable
from llumnix.instance.shortage import shortage
from llumnix.instance.step_times import StepTimes
from llumnix.instance.swap import SwapDone
from llumnix.instance.switching import HostMemory, Switching
from llumnix.policies.registry import preemption_policy, selection_policy


class EngineCore(RequestTable, KvInPlace):
    """See the module. ``selection`` says which requests a load report offers to move; by default the
    cheapest; ``host`` where KV can be swapped to, None: nowhere."""

    def __init__(
        self,
        limits: ModelLimits,
        config: EngineConfig,
        selection: SelectionPolicy | None = None,
        swap: SwapConfig | None = None,
        host: HostMemory | None = None,
    ) -> None:
        swap = swap or SwapConfig()
        self._offers = MoveOffers(selection)
        self._times = StepTimes()
        self._blocks = BlockManager(limits.capacity_blocks, grouped=swap.block_groups)
        self._switching = Switching(
            self._blocks,
            host,
            swap,
            block_size=limits.block_size,
            block_bytes=limits.block_bytes,
            times=self._times,
        )
        self._scheduler = LocalScheduler(
            self._blocks,
            self._switching,
            swap,
            block_size=limits.block_size,
            step_tokens_max=config.step_tokens_max,
            batch_max=config.batch_max,
            prefill_alone=config.prefill == "alone",
        )
        super().__init__(limits, config.waiting_max, self._scheduler.waiting, self._scheduler.tenants)
        self._preempted: list[str] = []
        self._tokens_total = 0
        self._preemptions_total = 0

    # Steps.

    def schedule(self, now: float) -> StepPlan:
        """Decide the next step. The plan must be applied before anything else is asked of the engine."""
        chunks, preempted = self._scheduler.plan()
        self._preempted.extend(preempted)
        self._preemptions_total += len(preempted)
        jobs, wait_for = self._switching.orders(computes=bool(chunks))
        return StepPlan(tuple(chunks), jobs, wait_for)

    def swapped(self, done: Collection[SwapDone]) -> bool:
        """Take in which copies have ended; called before ``schedule``, and again once those have ended that
        a plan waits for. True: then that plan must not be computed but made again, by another ``schedule``:
        it counts on KV that was lost."""
        return self._scheduler.swapped(done)

    def apply(
        self, plan: StepPlan, sampled: Sequence[SampledToken], now: float, duration_s: float
    ) -> StepResult:
        """Take in what a plan's sampling chunks produced, in its order. Raises InvariantError on another
        number."""
        deltas: dict[str, list[TokenDelta]] = {}
        finished: list[str] = []
        batch, tenants = self._scheduler.batch, self._scheduler.tenants
        results, steady = iter(sampled), not batch.prefilling and not plan.jobs
        computed = taken = prompt = 0
        for chunk in plan.chunks:
            request = chunk.request
            request.computed_tokens += chunk.count
            computed += chunk.count
            prompt += chunk.count if chunk.count > 1 else 0
            if not chunk.samples:
                continue
            result = next(results, None)
            if result is None:
                raise InvariantError(f"the executor returned {taken} tokens, too few for the plan")
            taken += 1
            request.sampled(result.token, result.logprob)
            tenants.generated(request.tenant, 1)
            generated = len(request.tokens) - request.prompt_len
            reason = self._finish_reason(request, result.token, generated)
            delta = _delta(request, result, generated - 1, reason)
            if request.frontend_address in deltas:
                deltas[request.frontend_address].append(delta)
            else:
                deltas[request.frontend_address] = [delta]
            if reason is not None:
                finished.append(request.request_id)
                self._finish(request, reason)
            elif request.request_id in batch.prefilling:
                batch.prefill_done(request)
        if taken != len(sampled):
            raise InvariantError(
                f"the executor returned {len(sampled)} tokens where {taken} were to be sampled"
            )
        self._tokens_total += taken
        if computed:
            if prompt:
                self._times.note_prefill(duration_s, prompt)
            else:
                self._times.note_decodes((duration_s,))
        preempted, self._preempted = tuple(self._preempted), []
        steady = steady and not (finished or preempted)
        return StepResult(deltas, tuple(finished), preempted, computed, duration_s, steady)

    def quiet(self, most: int) -> QuietStretch:
        """How many of the next steps, at most ``most``, could be done by ``advance``."""
        return self._scheduler.quiet(most)

    def advance(
        self, durations_s: Sequence[float], sample: Sample
    ) -> tuple[list[str], dict[str, list[TokenDelta]]]:
        """Do as many steps of a quiet stretch as there are durations, with the outcome of single ones.
        Returns who was decoded, and by frontend the last tokens of those that have ended; all others are in
        nobody's deltas and to be had from ``output_since``."""
        steps, decoding = len(durations_s), list(self._scheduler.batch.decoding)
        last: dict[str, list[TokenDelta]] = {}
        for request in self._scheduler.advance(steps, sample):
            token = SampledToken(request.tokens[-1])
            delta = _delta(request, token, request.output_len - 1, FinishReason.LENGTH)
            last.setdefault(request.frontend_address, []).append(delta)
            self._finish(request, FinishReason.LENGTH)
        self._tokens_total += steps * len(decoding)
        self._times.note_decodes(durations_s)
        return decoding, last

    def has_work(self) -> bool:
        return self._scheduler.has_work()

    def _finish_reason(self, request: Request, token: int, generated: int) -> FinishReason | None:
        sampling = request.sampling
        if generated >= sampling.min_tokens and (
            token in sampling.stop_token_ids
            or (token in self._limits.eos_token_ids and not sampling.ignore_eos)
        ):
            return FinishReason.STOP
        # The model's length needs no look: nothing was taken whose max_tokens go beyond it.
        return FinishReason.LENGTH if generated >= sampling.max_tokens else None

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._scheduler.finish(request)
        self._ended(request, reason)

    # Where requests are.

    def _enqueue(self, request: Request) -> None:
        self._scheduler.enqueue(request)

    def _drop(self, request: Request) -> None:
        self._scheduler.drop(request)

    # What is going on.

    def load(self) -> EngineLoad:
        scheduler, waiting = self._scheduler, self._scheduler.waiting
        head, missing = waiting.head(), scheduler.head_missing()
        candidates = self._offers.offers(scheduler.batch, waiting, missing, self._host_blocks)
        free_tokens, step_s = self._blocks.free_blocks * self._limits.block_size, self._times.mean_s
        return EngineLoad(  # by position: several times cheaper than by name, and every report has one
            self._blocks.capacity,
            self._blocks.owned_blocks,
            self._blocks.reserved_blocks,
            0 if head is None else waiting.blocks_of(head),
            waiting.blocks,
            scheduler.running,
            len(waiting),
            tuple(sorted(scheduler.batch.priorities.items())),
            candidates,
            step_s,
            self._tokens_total,
            self._preemptions_total,
            self._finished_total,
            self._offers.fault or self._switching.fault,
            scheduler.tenants.report(),
            self._switching.totals(),
            shortage(scheduler, free_tokens, step_s),
            (waiting.urgent, waiting.urgent_blocks),
            (),
            self._switching.kept_tokens_max,
            missing,
            0 if head is None else head.scheduling_priority,
            0.0 if head is None else head.arrived_at,
        )

    def _host_blocks(self, request: Request) -> int:
        return host_blocks(request, self._switching, self.block_size)

    def configure(self, config: SchedulerConfig) -> None:
        selection, preemption = selection_policy(config), preemption_policy(config)
        self._offers.use(selection)
        self._switching.use(preemption)
        self._scheduler.tenants.configure(config)

    def hear_tenants(self, totals: TenantTotals) -> None:
        self._scheduler.tenants.hear(totals.offsets)

    def rows(self, instance_id: str, now: float) -> tuple[RequestRow, ...]:
        return tuple(request.row(instance_id, now) for request in self._scheduler.held())

    def check(self) -> None:
        """Raise InvariantError unless every block is accounted for and every request is in one place."""
        self._blocks.check()
        self._switching.host.check()
        held = self._scheduler.held()
        if sorted(request.request_id for request in held) != sorted(self._requests):
            raise InvariantError("a request is in no place or in two")
        if sum(len(request.blocks) for request in held) != self._blocks.owned_blocks:
            raise InvariantError("blocks are owned by requests that are not held")

    # A migration's source.

    def movable(self, request_id: str) -> MovableState | None:
        request = self._requests.get(request_id)
        if request is None or self._scheduler.is_aside(request_id):
            return None
        return movable_state(request, self._switching, self.block_size)

    def take_out(self, request_id: str) -> MovableState:
        request = self._held(request_id)
        if self._scheduler.is_aside(request_id):
            raise InvariantError(f"request {request_id} is taken out or arriving from the host already")
        self._scheduler.take_out(request)
        return movable_state(request, self._switching, self.block_size)

    def put_back(self, request_id: str, epoch: int) -> None:
        """One that was aborted or replaced meanwhile stays so."""
        request = self._scheduler.taken_out.get(request_id)
        if request is not None:
            request.epoch = epoch
            self._scheduler.put_back(request)

    def release(self, request_id: str) -> None:
        """One that was aborted or replaced meanwhile stays so."""
        request = self._scheduler.taken_out.get(request_id)
        if request is not None:
            self._forget(request)

    # A migration's target.

    def keep_present(self, migration_id: str, spec: RequestSpec, blocks_max: int) -> int:
        """None: requests share no blocks."""
        return 0

    def reserve(self, migration_id: str, blocks: int) -> tuple[int, ...] | None:
        """A new reservation also needs a batch slot, and leaves running requests room to grow."""
        if blocks > 0 and self._blocks.reserved(migration_id) == 0:
            room = self._blocks.idle_blocks - self._scheduler.spare_blocks()
            if blocks > room or not self._scheduler.has_slot():
                return None
        return self._blocks.reserve(migration_id, blocks)

    def cancel_reservation(self, migration_id: str) -> None:
        self._blocks.cancel(migration_id)

    def adopt(
        self, migration_id: str, spec: RequestSpec, computed_tokens: int, now: float
    ) -> SubmitRefusal | None:
        """Blocks beyond those that the known tokens fill are freed."""
        refusal = self._adopt_refusal(spec, computed_tokens, self._blocks.reserved(migration_id))
        if refusal is not None:
            return refusal
        if computed_tokens == 0:
            self._blocks.cancel(migration_id)
            self._enqueue(self._take(spec, now))
            return None
        request = self._take(spec, now)
        request.computed_tokens = computed_tokens
        request.charged = True  # by whoever admitted it
        self._blocks.adopt(migration_id, request.request_id)
        self._blocks.trim(request.request_id, self._scheduler.waiting.blocks_of(request))
        request.blocks = self._blocks.table(request.request_id)
        self._scheduler.adopt(request)
        return None


def _delta(request: Request, result: SampledToken, index: int, reason: FinishReason | None) -> TokenDelta:
    return TokenDelta(
        request.request_id,
        request.epoch,
        index,
        (result.token,),
        reason,
        () if result.logprob is None else (result.logprob,),
    )
