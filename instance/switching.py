"""Switching between requests on one instance: who gives way how, what is copied between device and host
memory, and who is on the way back. Decisions only; a copier carries the jobs out while steps compute.

Life of a swapped-out request: its KV goes into a host copy (what the copy has already is not moved again),
its blocks are free at once, though whoever gets one first waits for the copy that reads it. Back at the head
of the queue it gets blocks and is *arriving* while they are filled; then it joins the batch, which did not
wait for it. It is waited for only if nothing else computes or the copy is short beside a step. If a copy
fails, the request has lost its KV and is computed again; nothing else happens to it.

A request that begins with tokens whose KV the host has (the next turn of a conversation, an equal prompt) is
treated as if it had been swapped out. Called by the local scheduler, which says who gives way and when.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Protocol

from llumnix.core.config import SchedulerConfig, SwapConfig
from llumnix.core.messages.control import RequestStatus
from llumnix.core.messages.load import SwapTotals
from llumnix.core.views import PreemptionAction, PreemptionDecision, PreemptionPolicy, VictimView
from llumnix.instance.block_manager import BlockManager
from llumnix.instance.free_runs import runs_of
from llumnix.instance.host_cache import HostCache, HostCopy, chain_hashes
from llumnix.instance.request import Request
from llumnix.instance.step_times import StepTimes
from llumnix.instance.swap import SwapDirection, SwapDone, SwapJob
from llumnix.instance.swap_ledger import SwapLedger
from llumnix.policies.guard import attempt
from llumnix.policies.preemption import CheapestPreemption

MIB = 1 << 20
SYNC_SHARE = 0.1  # of a step: a shorter copy in is waited for
AHEAD_BLOCKS_MIN = 8  # fewer full blocks are not worth a copy of their own
AHEAD_FREE_SHARE = 0.125  # of the device: with less free, victims are likely
FAULT_CHARS_MAX = 300


class HostMemory(Protocol):
    """What the core must know of where KV is swapped to; any Copier will do."""

    @property
    def host_blocks(self) -> int: ...
    def cost_s(self, blocks: int, runs: int) -> float: ...


@dataclass(slots=True)
class SwapCounts:
    """As in SwapTotals."""

    swapped_out: int = 0
    swapped_in: int = 0
    out_blocks: int = 0
    in_blocks: int = 0
    ahead_blocks: int = 0
    kept_blocks: int = 0
    reused_blocks: int = 0
    prefix_hits: int = 0
    prefix_blocks: int = 0
    host_full: int = 0
    errors: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """Where a request that is to be admitted finds the KV of its first ``tokens`` tokens."""

    copy: HostCopy
    tokens: int
    blocks: int


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """A request on its way in. Its blocks may be written only once the jobs ``after`` have ended."""

    request: Request
    job_id: int
    tokens: int
    copy: HostCopy
    after: frozenset[int]


class Switching:
    """See the module. ``arriving`` hold device blocks and are in no batch. ``kv_versions`` never gives the
    same twice, so that a request that left and came back is told from its former self."""

    def __init__(
        self,
        blocks: BlockManager,
        host: HostMemory | None,
        config: SwapConfig,
        *,
        block_size: int,
        block_bytes: int,
        times: StepTimes,
    ) -> None:
        self.counts = SwapCounts()
        self.arriving: dict[str, Arrival] = {}
        self.fault = ""
        self.kv_versions = count(1)
        self.host = HostCache(
            host.host_blocks if host else 0, block_size, self.kv_versions, grouped=config.block_groups
        )
        self.enabled = self.host.blocks.capacity > 0
        self._blocks, self._memory, self._config, self._times = blocks, host, config, times
        self._block_size = block_size
        step_bytes = config.swap_step_mib * MIB
        self._step_blocks = max(1, int(step_bytes / block_bytes)) if step_bytes and block_bytes else 0
        self._ledger = SwapLedger(blocks)
        self._computed_now: dict[int, Arrival] = {}
        self._default = CheapestPreemption(SchedulerConfig())
        self._policy: PreemptionPolicy = self._default

    @property
    def busy(self) -> bool:
        """Whether a copy is under way or to be begun."""
        return len(self._ledger) > 0

    @property
    def kept_tokens_max(self) -> int:
        """Of how many tokens the KV can be kept after their requests have ended."""
        return self.host.blocks.capacity * self._block_size if self._config.swap_reuse else 0

    def use(self, policy: PreemptionPolicy) -> None:
        """Decide by this policy from now on."""
        self._policy = policy
        self.fault = ""

    def totals(self) -> SwapTotals | None:
        """What happened so far; None without host memory."""
        if not self.enabled:
            return None
        pool = self.host.blocks
        return SwapTotals(
            host_capacity=pool.capacity,
            host_used=pool.owned_blocks,
            host_leased=self.host.leased_blocks,
            **asdict(self.counts),
        )

    # Out.

    def swap_out(self, request: Request) -> bool:
        """A running request gives way: put its KV on the way to the host if that is the better way and there
        is room. False: its KV is to be given up. Either way its blocks are the caller's to free."""
        if not self.enabled or request.computed_tokens == 0:
            return False
        if self._decide(request) is not PreemptionAction.SWAP:
            return False
        copy = self.host.room_for(request, request.computed_tokens, needed=True)
        if copy is None:
            self.counts.host_full += 1
            return False
        moved = self._copy_out(request, copy, request.computed_tokens)
        copy.needed = True
        self.counts.swapped_out += 1
        self.counts.out_blocks += moved
        self.counts.reused_blocks += -(-request.computed_tokens // self._block_size) - moved
        return True

    def is_out(self, request: Request) -> bool:
        """Whether the host has the KV of a request that gave way."""
        copy = self.host.find(request.request_id)
        return copy is not None and copy.needed

    def ahead(self, ranked: Sequence[Request]) -> None:
        """Copy out what is full and dirty of the first of these, likely victims first, that has enough of
        it."""
        if not self.ahead_wanted() or self._ledger.under_way(SwapDirection.OUT):
            return
        for request in ranked:
            full = request.computed_tokens // self._block_size
            if full - self._clean_blocks(request) < AHEAD_BLOCKS_MIN:
                continue
            copy = self.host.room_for(request, full * self._block_size, needed=False)
            if copy is not None:
                self.counts.ahead_blocks += self._copy_out(request, copy, full * self._block_size)
            return

    def ahead_wanted(self, free_blocks: int | None = None) -> bool:
        """Whether victims are likely soon, with so many free blocks (None: as many as there are)."""
        free = self._blocks.free_blocks if free_blocks is None else free_blocks
        return self.enabled and self._config.swap_ahead and free < AHEAD_FREE_SHARE * self._blocks.capacity

    def keep(self, request: Request) -> None:
        """A request has ended well: keep its KV for the next turn. Its device blocks are the caller's."""
        if not self.enabled or not self._config.swap_reuse:
            self.forget(request)
            return
        full = request.computed_tokens // self._block_size * self._block_size
        copy = self.host.room_for(request, full, needed=False) if full else None
        if copy is None:
            self.forget(request)
            return
        self.counts.kept_blocks += self._copy_out(request, copy, full)
        self.host.keep(copy)

    def forget(self, request: Request) -> None:
        """A request is held here no more: so is its copy."""
        self.arriving.pop(request.request_id, None)
        copy = self.host.find(request.request_id)
        if copy is not None:
            self.host.drop(copy)

    def _copy_out(self, request: Request, copy: HostCopy, tokens: int) -> int:
        """Make the copy hold the KV of the first ``tokens`` tokens; how many blocks have to be moved."""
        size = self._block_size
        copy.priority = request.execution_priority
        if copy.valid_tokens >= tokens:
            return 0
        first, end = copy.valid_tokens // size, -(-tokens // size)
        device, host = request.blocks[first:end], self.host.table(copy)[first:end]
        job_id = self._ledger.begin(request.request_id, SwapDirection.OUT, copy, device, host)
        if not self._config.swap_async:
            self._ledger.must_end((job_id,))
        copy.valid_tokens = tokens
        if self._config.swap_reuse:
            self.host.publish(copy)
        return end - first

    def _clean_blocks(self, request: Request) -> int:
        copy = self.host.find(request.request_id)
        return 0 if copy is None else min(copy.valid_tokens, request.computed_tokens) // self._block_size

    def loss_s(self, request: Request) -> float:
        """What it costs a running request to give way, by the way that would be chosen; 0.0: not known."""
        victim = self._victim(request)
        if self.enabled and self._decide(request) is PreemptionAction.SWAP:
            return victim.swap_out_s + victim.swap_in_s
        return victim.recompute_s

    def _victim(self, request: Request) -> VictimView:
        blocks = request.blocks[: -(-request.computed_tokens // self._block_size)]
        copy = self.host.find(request.request_id)
        same = copy is not None and copy.valid_tokens == request.computed_tokens
        dirty = [] if same else blocks[self._clean_blocks(request) :]
        return VictimView(
            request_id=request.request_id,
            execution_priority=request.execution_priority,
            known_tokens=len(request.tokens),
            computed_tokens=request.computed_tokens,
            blocks=len(request.blocks),
            dirty_blocks=len(dirty),
            swap_out_s=self._cost_s(dirty),
            swap_in_s=self._cost_s(blocks),
            recompute_s=request.computed_tokens * self._times.prefill_token_s,
        )

    def _decide(self, request: Request) -> PreemptionAction:
        view = self._victim(request)
        decision, fault = attempt(self._policy.decide, view)
        if not isinstance(decision, PreemptionDecision) or not isinstance(decision.action, PreemptionAction):
            name = type(self._policy).__name__
            self.fault = f"preemption: {name} {fault or f'returned {decision!r}'}"[:FAULT_CHARS_MAX]
            decision = self._default.decide(view)
        return decision.action

    def _cost_s(self, blocks: list[int]) -> float:
        if self._memory is None or not blocks:
            return 0.0
        return self._memory.cost_s(len(blocks), sum(1 for _ in runs_of(blocks)))

    # In.

    def source(self, request: Request) -> Source | None:
        """Where the KV of a waiting request is to come from; None: it has to be computed."""
        if not self.enabled:
            return None
        size, longest = self._block_size, len(request.tokens) - 1
        copy = self.host.find(request.request_id)
        if copy is not None:
            tokens = self.host.usable_tokens(copy, request)
            return Source(copy, tokens, -(-tokens // size)) if tokens else None
        if not self._config.swap_reuse:
            return None
        if len(request.block_hashes) < longest // size:
            request.block_hashes = chain_hashes(request.tokens, size, longest // size)
        found = self.host.match(request.block_hashes[: longest // size], request.tokens)
        if found is None:
            return None
        copy, blocks = found
        copied_s = self._cost_s(self.host.table(copy)[:blocks])
        computed_s = blocks * size * self._times.prefill_token_s
        return Source(copy, blocks * size, blocks) if not computed_s or copied_s < computed_s else None

    def may_begin(self, source: Source) -> bool:
        """Whether the cap on what one step copies in allows this one too."""
        begun = self._ledger.begun(SwapDirection.IN)
        return not self._step_blocks or not begun or begun + source.blocks <= self._step_blocks

    def settle(self) -> None:
        """Blocks given out so far are for the next step to write."""
        self._ledger.must_end(self._ledger.conflicts())

    def swap_in(self, request: Request, source: Source, *, alone: bool) -> bool:
        """Fill the blocks that a request was given since ``settle``. True: the next step waits for it and can
        compute it. ``alone``: nothing else would be computed."""
        size, copy = self._block_size, source.copy
        device, host = request.blocks[: source.blocks], self.host.table(copy)[: source.blocks]
        after = self._ledger.conflicts()
        if copy.request is request:
            self.counts.swapped_in += 1
            copy.needed = False
            self.host.touch(copy)
        else:
            self.counts.prefix_hits += 1
            self.counts.prefix_blocks += source.blocks
            if not self.host.inherit(copy, request, source.tokens // size):
                self.host.touch(copy)
        self.counts.in_blocks += source.blocks
        job_id = self._ledger.begin(request.request_id, SwapDirection.IN, copy, device, host)
        arrival = Arrival(request, job_id, source.tokens, copy, frozenset(after))
        if not self._config.swap_reuse:
            self.host.drop(copy)
        cost_s = self._cost_s(device)
        if self._config.swap_async and not alone and cost_s > SYNC_SHARE * self._times.mean_s:
            request.status = RequestStatus.SWAPPED
            self.arriving[request.request_id] = arrival
            return False
        self._ledger.must_end((job_id, *after))
        self._computed_now[job_id] = arrival
        return True

    def recompute_s(self, tokens: int) -> float:
        """What computing so many tokens again would take; 0.0: not known."""
        return tokens * self._times.prefill_token_s

    def fills(self, copy: HostCopy) -> bool:
        """Whether a copy is still being written."""
        return self._ledger.fills(copy)

    # What the copier says.

    def ended(self, done: Collection[SwapDone]) -> tuple[list[Arrival], list[Request]]:
        """Take in what has ended: who has arrived, and who has lost KV that the last plan counts on."""
        arrived: list[Arrival] = []
        lost: list[Request] = []
        for one in done:
            ended = self._ledger.ended(one)
            if ended.error:
                self._failed(ended.copy)
            if ended.job.direction is SwapDirection.OUT:
                continue
            spoiled = bool(ended.error) or ended.copy.failed
            now = self._computed_now.pop(ended.job.job_id, None)
            if now is not None:
                if spoiled:
                    lost.append(now.request)
                continue
            arrival = self.arriving.get(ended.job.request_id)
            if arrival is None or arrival.job_id != ended.job.job_id:
                continue  # it has been aborted meanwhile
            del self.arriving[ended.job.request_id]
            self._ledger.must_end(arrival.after)
            arrival.request.computed_tokens = 0 if spoiled else arrival.tokens
            arrived.append(arrival)
        return arrived, lost

    def orders(self, *, computes: bool) -> tuple[tuple[SwapJob, ...], tuple[int, ...]]:
        """The jobs of the plan that is complete now, and those it waits for: if it computes nothing, all."""
        return self._ledger.orders(wait_for_all=not computes)

    def _failed(self, copy: HostCopy) -> None:
        """What was to be copied from or to it is garbage, so nobody may use it again."""
        self.counts.errors += 1
        copy.failed = True
        if not self.host.leased(copy):
            self.host.drop(copy)
