"""Which requests of one instance compute in the next step, and which gives way when KV blocks run out.

A request held here is in exactly one place: waiting (no KV on the device), arriving (its KV is on its way in
from the host), in the batch, or taken out by a migration (its KV, if any, stays where it is). Called by the
engine core, between steps only.

- A step has a token budget. Every decode is in every step; what is left goes to prefill chunks, oldest
  admission first, then to newly admitted requests, so a long prompt never stalls a decode. With
  ``prefill_alone`` a step that prefills does nothing else, as in engines before chunked prefill.
- The head of the queue is admitted once the KV of all its tokens fits and room for the others to grow is
  left. It gets all those blocks at once, so no prefill can block halfway. Nothing overtakes a head that does
  not fit.
- When a running request needs a block and none is free, the running request of lowest execution priority,
  then of the tenant served most, then of latest arrival, is preempted; that may be the one that asks. So the
  first in that order is never preempted for another, always advances, and everything ends. A preempted
  request waits again at its old arrival; its KV is on its way to the host (switching.py), or given up.
- Every so many steps, if set so, a head that does not fit displaces running requests that it outranks.
- Batch slots are counted for reservations, arriving and taken-out requests too: whatever returns or arrives
  has its place.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

from llumnix.core.config import SchedulerConfig, SwapConfig
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import RequestStatus
from llumnix.instance.batch import NOT_QUIET, Batch, QuietStretch
from llumnix.instance.block_manager import BlockManager
from llumnix.instance.executor import Chunk
from llumnix.instance.ranking import Ranking
from llumnix.instance.request import Request
from llumnix.instance.swap import SwapDone
from llumnix.instance.switching import Switching
from llumnix.instance.tenant_counters import TenantCounters
from llumnix.instance.waiting_queue import WaitingQueue

WATERMARK_SHARE = 0.01

Sample = Callable[[Collection[Request], int], Sequence[Iterable[int]]]
"""What a quiet stretch of so many steps gives each of these requests: tokens of which none may end it."""


class LocalScheduler:
    """See the module."""

    def __init__(
        self,
        blocks: BlockManager,
        switching: Switching,
        swap: SwapConfig,
        *,
        block_size: int,
        step_tokens_max: int,
        batch_max: int,
        prefill_alone: bool = False,
    ) -> None:
        self.tenants = TenantCounters(SchedulerConfig())
        self.ranking = Ranking(self.tenants, swap)
        self.waiting = WaitingQueue(block_size, self.ranking)
        self.batch = Batch(block_size)
        self.taken_out: dict[str, Request] = {}
        self.switching = switching
        self._blocks = blocks
        self._block_size = block_size
        self._step_tokens_max = step_tokens_max
        self._prefill_alone = prefill_alone
        # Every decode must fit the budget, and one prefilling request among them must find a token left.
        self._batch_max = min(batch_max, step_tokens_max)
        self._watermark = max(1, int(blocks.capacity * WATERMARK_SHARE))

    @property
    def running(self) -> int:
        """Requests in the batch or about to be."""
        return len(self.batch) + len(self.switching.arriving)

    def held(self) -> list[Request]:
        """Every request, running ones first."""
        arriving = (arrival.request for arrival in self.switching.arriving.values())
        return [*self.batch, *arriving, *self.taken_out.values(), *self.waiting]

    def is_aside(self, request_id: str) -> bool:
        """Whether a request is neither in the queue nor in the batch, and so cannot be taken out."""
        return request_id in self.taken_out or request_id in self.switching.arriving

    def enqueue(self, request: Request) -> None:
        """Add a request without KV on the device to the queue."""
        request.kv_version = next(self.switching.kv_versions)
        self._wait(request)

    def adopt(self, request: Request) -> None:
        """Add a request that came with its KV."""
        request.kv_version = next(self.switching.kv_versions)
        self.batch.join(request)

    def finish(self, request: Request) -> None:
        """A running request has ended well: free its blocks, with its KV kept for a next turn."""
        self.switching.keep(request)
        self.batch.leave(request)
        self._free(request)

    def drop(self, request: Request) -> None:
        """Forget a request wherever it is, and free its blocks."""
        arriving = request.request_id in self.switching.arriving
        self.switching.forget(request)
        if self.taken_out.pop(request.request_id, None) is None and not arriving:
            self._leave(request)
        self._free(request)

    def take_out(self, request: Request) -> None:
        """Set a waiting or running request aside; its blocks stay, those of host memory too."""
        self._leave(request)
        request.status = RequestStatus.MIGRATING
        if not request.blocks:
            self.switching.host.lease(request)
        self.taken_out[request.request_id] = request

    def put_back(self, request: Request) -> None:
        """Return a request that was set aside to where it was."""
        del self.taken_out[request.request_id]
        if request.blocks:
            self.batch.join(request)
        else:
            self.switching.host.end_lease(request)
            self._wait(request)

    def has_work(self) -> bool:
        """Whether the next step would compute, copy or wait for something."""
        if len(self.batch) > 0 or self.switching.busy:
            return True
        head = self.waiting.head()
        return head is not None and self._admissible(head)

    def has_slot(self) -> bool:
        """Whether the batch has a place for one more, admitted or arriving."""
        aside = sum(1 for request in self.taken_out.values() if request.blocks)
        return self.running + aside + self._blocks.reservations < self._batch_max

    def head_missing(self) -> int:
        """Blocks that the head of the queue lacks to be admitted; 0: none, or nobody waits."""
        head = self.waiting.head()
        if head is None:
            return 0
        return max(0, self.waiting.blocks_of(head) + self.spare_blocks() - self._blocks.free_blocks)

    def spare_blocks(self) -> int:
        """Blocks that newcomers, admitted or arriving, leave free: one for each running request to grow into,
        so that a newcomer does not have to give way again within its first block."""
        return max(self._watermark, self.running) if self.running else 0

    def swapped(self, done: Collection[SwapDone]) -> bool:
        """Take in which copies have ended. True: the last plan counts on KV that is lost, so it must not be
        computed but made again."""
        if not done:
            return False
        arrived, lost = self.switching.ended(done)
        for arrival in arrived:
            self.batch.join(arrival.request)
        for request in lost:
            if request.status is RequestStatus.RUNNING:
                self.batch.prefill_again(request)
        return bool(lost)

    def plan(self) -> tuple[list[Chunk], list[str]]:
        """The next step's chunks, decodes first, and the requests preempted for it."""
        displaces = self.ranking.until_update() == 0
        preempted = self._grow()
        decodes = [Chunk(one, one.computed_tokens, 1, True) for one in self.batch.decoding.values()]
        chunks = self._fill(decodes, preempted, displaces=displaces)
        if self.switching.ahead_wanted():
            self.switching.ahead(self.ranking.last_first(self._settled()))
        self.ranking.steps_done(1)
        return chunks, preempted

    def _fill(self, decodes: list[Chunk], preempted: list[str], *, displaces: bool) -> list[Chunk]:
        """Add prefills, and who is admitted, to a step of ``decodes``, as far as its budget goes; who is
        displaced for it is added to ``preempted``."""
        prefills: list[Chunk] = []
        budget = self._budget_beside(decodes)
        for request in self.batch.prefilling.values():
            if budget == 0:
                break
            budget -= self._prefill(request, budget, prefills)
        while budget > 0:
            head = self.waiting.head()
            if head is None:
                break
            if not self._admissible(head):
                victims = self._displaced(head) if displaces else []
                if not victims:
                    break
                preempted += [victim.request_id for victim in victims]
                decodes, prefills = _still_running(decodes), _still_running(prefills)
                budget = self._budget_beside(decodes) - sum(chunk.count for chunk in prefills)
                continue
            if not self._admit(head, alone=not decodes and not prefills):
                break
            if head.status is RequestStatus.RUNNING and head.prefilled:
                decodes.append(Chunk(head, head.computed_tokens, 1, True))
                budget -= not self._prefill_alone
            elif head.status is RequestStatus.RUNNING:
                budget -= self._prefill(head, budget, prefills)
        if self._prefill_alone:
            return prefills or decodes
        return [*decodes, *prefills]

    def _budget_beside(self, decodes: list[Chunk]) -> int:
        return self._step_tokens_max - (0 if self._prefill_alone else len(decodes))

    def quiet(self, most: int) -> QuietStretch:
        """How many of the next steps, at most ``most``, admit, prefill, preempt and copy nothing, and end
        nothing but in the last of them. A request that may end by a token it samples, or wants logprobs, is
        never quiet; end tokens of the model are the caller's to rule out."""
        if self.switching.busy:
            return NOT_QUIET
        head = self.waiting.head()
        if head is not None:
            update = self.ranking.until_update()
            most = most if update is None else min(most, update)
            settled = self.waiting.settled or self.ranking.fixed
            if not settled or self._admissible(head):
                return NOT_QUIET
        plain = self.batch.plain_stretch(most)
        most = plain.steps
        while most > 0 and self._is_tight(plain.requests * (most // self._block_size + 1)):
            if not self._is_tight(self.batch.growth(most)):
                break
            most //= 2
        return QuietStretch(most, plain.requests, plain.context_tokens) if most > 0 else NOT_QUIET

    def advance(self, steps: int, sample: Sample) -> list[Request]:
        """Do ``steps`` quiet steps at once, taking blocks in the order in which single steps would. Returns
        who has reached its length."""
        if not self._blocks.grow_in_place(self.batch.growth_each(steps)):
            for request_id in self.batch.growths(steps):
                if not self._take_blocks(self.batch.decoding[request_id], 1):
                    raise InvariantError(
                        f"a stretch of {steps} steps was not quiet: no block for {request_id}"
                    )
        generated: dict[str, int] = {}
        ended: list[Request] = []
        decoding = self.batch.decoding.values()
        for request, sampled in zip(decoding, sample(decoding, steps), strict=True):
            tokens = request.tokens
            tokens += sampled
            request.computed_tokens += steps
            if len(tokens) >= request.tokens_max:
                ended.append(request)
            generated[request.tenant] = generated.get(request.tenant, 0) + steps
        for tenant, count in generated.items():
            self.tenants.generated(tenant, count)
        self.ranking.steps_done(steps)
        return ended

    def _is_tight(self, growth: int) -> bool:
        """Whether taking so many blocks would make a request give way, or copies begin."""
        left = self._blocks.free_blocks - growth
        return left < 0 or self.switching.ahead_wanted(left)

    def _wait(self, request: Request) -> None:
        swapped = self.switching.is_out(request)
        request.status = RequestStatus.SWAPPED if swapped else RequestStatus.WAITING
        self.waiting.push(request)

    def _admissible(self, request: Request) -> bool:
        room = self._blocks.free_blocks - self.spare_blocks()
        return self.waiting.blocks_of(request) <= room and self.has_slot()

    def _admit(self, head: Request, *, alone: bool) -> bool:
        """Take the head of the queue in, to compute at once or to arrive. False: too much is being copied in
        this step."""
        source = self.switching.source(head)
        if source is not None and not self.switching.may_begin(source):
            return False
        self.waiting.remove(head)
        if not head.charged:
            head.charged = True
            self.tenants.admitted(head.tenant, head.prompt_len)
        keep_idle = self.spare_blocks()
        self.switching.settle()
        self._take_blocks(head, self.waiting.blocks_of(head), 0 if source is None else keep_idle)
        head.blocks = self._blocks.table(head.request_id)
        head.kv_version = next(self.switching.kv_versions)
        if source is None:
            self.batch.join(head)
        elif self.switching.swap_in(head, source, alone=alone):
            head.computed_tokens = source.tokens
            self.batch.join(head)
        return True

    def _prefill(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        missing = len(request.tokens) - request.computed_tokens
        count = min(budget, missing)
        chunks.append(Chunk(request, request.computed_tokens, count, count == missing))
        return count

    def _grow(self) -> list[str]:
        """Give every running request the blocks that its known tokens need, preempting where none are
        left."""
        size = self._block_size
        short = [request for request in self.batch if len(request.tokens) > len(request.blocks) * size]
        preempted: list[str] = []
        for request in short:
            if request.status is not RequestStatus.RUNNING:
                continue  # was itself preempted for one before it
            missing = self.waiting.blocks_of(request) - len(request.blocks)
            while not self._take_blocks(request, missing):
                victim = max(self.batch, key=self.ranking.preemption_rank)
                self._preempt(victim)
                preempted.append(victim.request_id)
                if victim is request:
                    break
        return preempted

    def _settled(self) -> list[Request]:
        """Who has computed something since it joined the batch. The others are not displaced, so that even
        constant updates let everything end, nor copied ahead: their KV may still be on its way."""
        return [request for request in self.batch if request.computed_tokens > request.joined_tokens]

    def _displaced(self, head: Request) -> list[Request]:
        """Preempt as many of the lowest as the head needs and outranks; none if they are not enough."""
        missing = self.waiting.blocks_of(head) + self.spare_blocks() - self._blocks.free_blocks
        slots = 0 if self.has_slot() else 1
        victims: list[Request] = []
        for request in self.ranking.last_first(self._settled()):
            if missing <= 0 and slots <= 0:
                break
            if not self.ranking.outranks(head, request):
                return []
            victims.append(request)
            missing -= len(request.blocks)
            slots -= 1
        if missing > 0 or slots > 0:
            return []
        for victim in victims:
            self._preempt(victim)
        return victims

    def _take_blocks(self, request: Request, count: int, keep_idle: int = 0) -> bool:
        """``count`` more blocks for a request, in a place where it can grow to its full length; False: too
        few are free."""
        longest = -(-request.tokens_max // self._block_size)
        expected = max(0, longest - len(request.blocks) - count)
        return self._blocks.grow(request.request_id, count, expected, keep_idle)

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks; its KV goes to the host or is to be computed again later."""
        self.switching.swap_out(request)
        self.batch.leave(request)
        self._free(request)
        request.computed_tokens = 0
        request.preemptions += 1
        self.enqueue(request)

    def _free(self, request: Request) -> None:
        self._blocks.free(request.request_id)
        request.blocks = []

    def _leave(self, request: Request) -> None:
        """Remove a request from the queue or the batch."""
        if request.status is RequestStatus.RUNNING:
            self.batch.leave(request)
        else:
            self.waiting.remove(request)


def _still_running(chunks: list[Chunk]) -> list[Chunk]:
    return [chunk for chunk in chunks if chunk.request.status is RequestStatus.RUNNING]
