"""Which requests of one instance compute in the next step, and which gives way when KV blocks run out.

A request held here is in exactly one place: waiting (no KV), prefilling or decoding (together: running), or
taken out by a migration (its KV, if any, stays where it is). Called by the engine core, between steps only.

- A step has a token budget. Every decode is in every step; what is left goes to prefill chunks, oldest
  admission first, then to newly admitted requests, so a long prompt never stalls a decode. With
  ``prefill_alone`` a step that prefills does nothing else, as in engines before chunked prefill.
- The head of the queue is admitted once the KV of all its tokens fits and room for the others to grow is
  left. It gets all those blocks at once, so no prefill can block halfway. Nothing overtakes a head that does
  not fit.
- When a running request needs a block and none is free, the running request of lowest execution priority,
  then of the tenant served most, then of latest arrival, is preempted; that may be the one that asks. So the
  first in that order is never preempted for another, always advances, and everything ends. A preempted
  request waits again at its old arrival.
- Batch slots are counted for reservations and taken-out requests too: whatever returns or arrives has its
  place.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from llumnix.core.config import SchedulerConfig
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import RequestStatus
from llumnix.instance.block_manager import BlockManager
from llumnix.instance.executor import Chunk
from llumnix.instance.request import Request
from llumnix.instance.tenant_counters import TenantCounters
from llumnix.instance.waiting_queue import WaitingQueue

WATERMARK_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class QuietStretch:
    """The next ``steps`` steps only decode the same ``requests`` requests; the first of them attends to
    ``context_tokens`` tokens in total, each later one to ``requests`` more."""

    steps: int
    requests: int
    context_tokens: int


NOT_QUIET = QuietStretch(0, 0, 0)


class LocalScheduler:
    """See the module. ``priorities`` counts the running requests of each execution priority."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        block_size: int,
        step_tokens_max: int,
        batch_max: int,
        prefill_alone: bool = False,
        tenants: TenantCounters | None = None,
    ) -> None:
        self.tenants = tenants or TenantCounters(SchedulerConfig())
        self.waiting = WaitingQueue(block_size, self.tenants.counter)
        self.prefilling: dict[str, Request] = {}
        self.decoding: dict[str, Request] = {}
        self.taken_out: dict[str, Request] = {}
        self.priorities: dict[int, int] = {}
        self._blocks = blocks
        self._block_size = block_size
        self._step_tokens_max = step_tokens_max
        self._prefill_alone = prefill_alone
        # Every decode must fit the budget, and one prefilling request among them must find a token left.
        self._batch_max = min(batch_max, step_tokens_max)
        self._watermark = max(1, int(blocks.capacity * WATERMARK_SHARE))
        self._kv_versions = 0

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self.prefilling) + len(self.decoding)

    def running_requests(self) -> Iterator[Request]:
        """Every request in the batch, decodes first."""
        yield from self.decoding.values()
        yield from self.prefilling.values()

    def enqueue(self, request: Request) -> None:
        """Add a request without KV to the queue."""
        request.status = RequestStatus.WAITING
        request.kv_version = self._next_kv_version()
        self.waiting.push(request)

    def join(self, request: Request) -> None:
        """Add a request whose KV is here to the batch."""
        request.status = RequestStatus.RUNNING
        (self.decoding if request.prefilled else self.prefilling)[request.request_id] = request
        count = self.priorities.get(request.execution_priority, 0)
        self.priorities[request.execution_priority] = count + 1

    def adopt(self, request: Request) -> None:
        """Add a request that came with its KV."""
        request.kv_version = self._next_kv_version()
        self.join(request)

    def prefill_done(self, request: Request) -> None:
        """Its first token after a prefill was sampled: from the next step on it decodes."""
        self.decoding[request.request_id] = self.prefilling.pop(request.request_id)

    def drop(self, request: Request) -> None:
        """Forget a request wherever it is, and free its blocks."""
        if self.taken_out.pop(request.request_id, None) is None:
            self._leave(request)
        self._free(request)

    def take_out(self, request: Request) -> None:
        """Set a waiting or running request aside; its blocks stay."""
        self._leave(request)
        request.status = RequestStatus.MIGRATING
        self.taken_out[request.request_id] = request

    def put_back(self, request: Request) -> None:
        """Return a request that was set aside to where it was."""
        del self.taken_out[request.request_id]
        if request.blocks:
            self.join(request)
        else:
            request.status = RequestStatus.WAITING
            self.waiting.push(request)

    def has_work(self) -> bool:
        """Whether the next step would compute something."""
        head = self.waiting.head()
        return self.running > 0 or (head is not None and self._admissible(head))

    def has_slot(self) -> bool:
        """Whether the batch has a place for one more, admitted or arriving."""
        aside = sum(1 for request in self.taken_out.values() if request.blocks)
        return self.running + aside + self._blocks.reservations < self._batch_max

    def spare_blocks(self) -> int:
        """Blocks that newcomers, admitted or arriving, leave free: one for each running request to grow into,
        so that a newcomer does not have to give way again within its first block."""
        return max(self._watermark, self.running) if self.running else 0

    def plan(self) -> tuple[list[Chunk], list[str]]:
        """The next step's chunks, decodes first, and the requests preempted for it."""
        preempted = self._grow()
        decodes = [Chunk(request, request.computed_tokens, 1, True) for request in self.decoding.values()]
        if not self._prefill_alone:
            return self._add_prefills(decodes), preempted
        return self._add_prefills([]) or decodes, preempted

    def _add_prefills(self, chunks: list[Chunk]) -> list[Chunk]:
        """Fill what is left of a step's budget, admitting who fits."""
        budget = self._step_tokens_max - len(chunks)
        for request in self.prefilling.values():
            if budget == 0:
                break
            budget -= self._prefill(request, budget, chunks)
        while budget > 0:
            head = self.waiting.head()
            if head is None or not self._admissible(head):
                break
            self.waiting.remove(head)
            if not head.charged:
                head.charged = True
                self.tenants.admitted(head.tenant, head.prompt_len)
            self._take_blocks(head, self.waiting.blocks_of(head))
            head.blocks = self._blocks.table(head.request_id)
            self.join(head)
            budget -= self._prefill(head, budget, chunks)
        return chunks

    def quiet(self, most: int) -> QuietStretch:
        """How many of the next steps, at most ``most``, admit, prefill, end and preempt nothing. A request
        that may end by a token it samples, or wants logprobs, is never quiet; end tokens of the model are the
        caller's to rule out."""
        if self.prefilling or not self.decoding:
            return NOT_QUIET
        head = self.waiting.head()
        if head is not None and (not self.waiting.settled or self._admissible(head)):
            return NOT_QUIET
        context = 0
        for request in self.decoding.values():
            sampling, known = request.sampling, len(request.tokens)
            if sampling.stop_token_ids or sampling.logprobs >= 0:
                return NOT_QUIET
            left = sampling.max_tokens - known + request.prompt_len - 1
            if left < most:
                most = left
            context += known
        batch, free = len(self.decoding), self._blocks.free_blocks
        while most > 0 and batch * (most // self._block_size + 1) > free and self._growth(most) > free:
            most //= 2
        return QuietStretch(most, batch, context) if most > 0 else NOT_QUIET

    def advance(self, steps: int, sample: Callable[[Request, int], Iterable[int]]) -> None:
        """Do ``steps`` quiet steps at once, taking blocks in the order in which single steps would.
        ``sample`` gives a request's next tokens, of which none may end it."""
        size = self._block_size
        growths: list[tuple[int, int, str]] = []
        for order, request in enumerate(self.decoding.values()):
            first = len(request.blocks) * size + 1 - len(request.tokens)
            if first < steps:
                growths += [(step, order, request.request_id) for step in range(first, steps, size)]
        growths.sort()
        for _, _, request_id in growths:
            if not self._take_blocks(self.decoding[request_id], 1):
                raise InvariantError(f"a stretch of {steps} steps was not quiet: no block for {request_id}")
        generated: dict[str, int] = {}
        for request in self.decoding.values():
            request.tokens.extend(sample(request, steps))
            request.computed_tokens += steps
            generated[request.tenant] = generated.get(request.tenant, 0) + steps
        for tenant, tokens in generated.items():
            self.tenants.generated(tenant, tokens)

    def _growth(self, steps: int) -> int:
        """Blocks that the decoding requests take in the next ``steps`` steps."""
        size = self._block_size
        return sum(
            (len(request.tokens) + steps + size - 2) // size - len(request.blocks)
            for request in self.decoding.values()
        )

    def _prefill(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        missing = len(request.tokens) - request.computed_tokens
        count = min(budget, missing)
        chunks.append(Chunk(request, request.computed_tokens, count, count == missing))
        return count

    def _admissible(self, request: Request) -> bool:
        room = self._blocks.free_blocks - self.spare_blocks()
        return self.waiting.blocks_of(request) <= room and self.has_slot()

    def _grow(self) -> list[str]:
        """Give every running request the blocks that its known tokens need, preempting where none are
        left."""
        size = self._block_size
        short = [
            request for request in self.running_requests() if len(request.tokens) > len(request.blocks) * size
        ]
        preempted: list[str] = []
        for request in short:
            if request.status is not RequestStatus.RUNNING:
                continue  # was itself preempted for one before it
            missing = self.waiting.blocks_of(request) - len(request.blocks)
            while not self._take_blocks(request, missing):
                victim = max(self.running_requests(), key=self._preemption_rank)
                self._preempt(victim)
                preempted.append(victim.request_id)
                if victim is request:
                    break
        return preempted

    def _take_blocks(self, request: Request, count: int) -> bool:
        """``count`` more blocks for a request, in a place where it can grow to its full length; False: too
        few are free."""
        longest = -(-(request.prompt_len + request.sampling.max_tokens) // self._block_size)
        expected = max(0, longest - len(request.blocks) - count)
        return self._blocks.grow(request.request_id, count, expected)

    def _preempt(self, request: Request) -> None:
        """Give up a running request's KV, to be computed again later."""
        self._leave(request)
        self._free(request)
        request.computed_tokens = 0
        request.preemptions += 1
        self.enqueue(request)

    def _free(self, request: Request) -> None:
        self._blocks.free(request.request_id)
        request.blocks = []

    def _leave(self, request: Request) -> None:
        """Remove a request from the queue or the batch."""
        if request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
            return
        if self.decoding.pop(request.request_id, None) is None:
            del self.prefilling[request.request_id]
        count = self.priorities[request.execution_priority] - 1
        if count:
            self.priorities[request.execution_priority] = count
        else:
            del self.priorities[request.execution_priority]

    def _next_kv_version(self) -> int:
        # Never the same twice on an instance, so a request that left and came back is told from its former
        # self.
        self._kv_versions += 1
        return self._kv_versions

    def _preemption_rank(self, request: Request) -> tuple[int, float, float, str]:
        """The highest goes first."""
        counter = self.tenants.counter(request.tenant)
        return -request.execution_priority, counter, request.arrived_at, request.request_id
