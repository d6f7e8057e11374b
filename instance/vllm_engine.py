"""The Engine protocol over an unpatched vLLM engine in this process.

Who decides what: our queue orders admission (scheduling priority, tenant fairness, arrival, as with our own
engine) and hands vLLM a request only when its KV fits; from then on vLLM schedules, chunks, batches and
preempts, by its own priority scheduling, whose scale is the other way round. So a request is in one place
only: waiting here, in vLLM, or taken out by a migration.

A request leaves vLLM by being aborted there once its KV is in the pool (vllm_staging.py), and enters it,
moved in or put back, as prompt + generated tokens whose KV the connector loads. Counts of blocks are told in
our block size, so that instances of different engines compare. Methods are called between steps only, by
the engine thread (runtime/instance_server.py); see engine.py for their contracts.
"""

from dataclasses import replace

from llumnix.core.errors import InvariantError
from llumnix.core.messages.serving import RejectCode, RequestSpec
from llumnix.instance.engine import MovableState, SubmitRefusal
from llumnix.instance.vllm_arrivals import LoadingReaders
from llumnix.instance.vllm_exchange import Import
from llumnix.instance.vllm_holds import Hold
from llumnix.instance.vllm_requests import TakenOut, VllmRequests
from llumnix.migration.transports.base import ReaderFactory

GROWTH_BLOCKS = 4
"""Blocks kept in the pool for what a request generates while it moves; more are taken if there are."""

POOL_FULL = "the pool that peers read has no room for its KV"


class VllmEngine(VllmRequests):
    """See the module. Raises ConfigurationError if vLLM does not start."""

    # A migration's source.

    def begin_move(self, request_id: str, present_blocks: int = 0) -> str:
        """What the target has stays in vLLM's own blocks: if the request is to go on here after all, vLLM
        finds them in its prefix cache."""
        entered, size = self._core.entered.get(request_id), self._limits.block_size
        if entered is None or not entered.computed:
            return ""
        first = self._core.exchange.whole_blocks(present_blocks * size) if self._core.caches else 0
        tokens = len(entered.request.tokens) + GROWTH_BLOCKS * size
        if self._staging.begin(request_id, first, tokens):
            return ""
        return POOL_FULL

    def end_move(self, request_id: str) -> None:
        if self._staging.moving(request_id):
            self._staging.stop(request_id)

    def movable(self, request_id: str) -> MovableState | None:
        request, entered = self._requests.get(request_id), self._core.entered.get(request_id)
        if request is None or request_id in self._taken_out or (entered is not None and entered.importing):
            return None
        computed = entered.computed if entered is not None else 0
        blocks, hindrance = tuple[int, ...](), ""
        full, size, first = computed // self._limits.block_size, self._limits.block_size, 0
        copied = full
        if entered is not None and computed and self._staging.moving(request_id):
            found = self._staging.copied(request_id, entered.vllm_id, computed)
            first = self._staging.began_at(request_id) // size
            if found is None:
                hindrance, copied = POOL_FULL, first
            else:
                blocks, copied = found[0], found[1] // size
        return MovableState(
            waiting=computed == 0,
            blocks=blocks,
            full_blocks=copied,
            computed_tokens=computed,
            known_tokens=len(request.tokens),
            kv_version=request.kv_version,
            lagging=copied < full,
            first_block=first,
            hindrance=hindrance,
        )

    def take_out(self, request_id: str) -> MovableState:
        request, state = self._held(request_id), self.movable(request_id)
        if state is None:
            raise InvariantError(f"request {request_id} is taken out already")
        entered = self._core.entered.get(request_id)
        hold = Hold()
        if entered is None:
            self._waiting.remove(request)
        else:
            if state.computed_tokens:
                last = self._staging.finish(request_id, entered.vllm_id, state.computed_tokens)
                state = replace(state, blocks=last)
            hold = self._core.leave(entered, keep_tokens=state.first_block * self._limits.block_size)
        self._taken_out[request_id] = TakenOut(state, hold)
        return state

    def put_back(self, request_id: str, epoch: int) -> None:
        """One that was aborted or replaced meanwhile stays so."""
        taken = self._taken_out.pop(request_id, None)
        if taken is None:
            return
        request, state = self._requests[request_id], taken.state
        request.epoch = epoch
        if state.waiting:
            self._waiting.push(request)
        else:
            first = state.first_block * self._limits.block_size
            self._core.enter(request, Import(state.blocks, first, state.computed_tokens), taken.hold)

    def release(self, request_id: str) -> None:
        """One that was aborted or replaced meanwhile stays so."""
        if request_id in self._taken_out:
            self._forget(self._requests[request_id])

    # A migration's target.

    def readers(self, readers: ReaderFactory) -> ReaderFactory:
        """What is read goes on into vLLM's blocks before a read ends."""
        return LoadingReaders(readers, self._core.arrivals)

    def keep_present(self, migration_id: str, spec: RequestSpec, blocks_max: int) -> int:
        """What vLLM's prefix cache has."""
        tokens = (spec.prompt_tokens + spec.output_tokens)[: blocks_max * self._limits.block_size]
        hashes = self._core.block_hashes(tokens, spec.adapter)
        return self._core.arrivals.begin(migration_id, hashes, keep_blocks=len(self._core.entered))

    def reserve(self, migration_id: str, blocks: int) -> tuple[int, ...] | None:
        """Needs room in vLLM, and in the pool for what is not present; a new reservation also needs a batch
        slot."""
        staging, arrivals = self._staging.blocks, self._core.arrivals
        coming = blocks - arrivals.present(migration_id) // self._limits.block_size
        held = staging.reserved(migration_id)
        if not arrivals.intact(migration_id):
            return None
        if coming > held:
            if (coming - held) * self._limits.block_size > self._room() - self._core.block_size:
                return None
            if held == 0 and not self._has_slot():
                return None
        reserved = staging.reserve(migration_id, coming)
        if reserved is not None:
            arrivals.hold(migration_id, reserved, keep_blocks=len(self._core.entered))
        return reserved

    def cancel_reservation(self, migration_id: str) -> None:
        self._core.arrivals.let_go(migration_id)
        self._staging.blocks.cancel(migration_id)

    def adopt(
        self, migration_id: str, spec: RequestSpec, computed_tokens: int, now: float
    ) -> SubmitRefusal | None:
        """Pool blocks are freed once vLLM has taken their KV in."""
        staging, arrivals = self._staging.blocks, self._core.arrivals
        present = arrivals.present(migration_id) // self._limits.block_size
        refusal = self._adopt_refusal(spec, computed_tokens, present + staging.reserved(migration_id))
        if refusal is not None:
            return refusal
        if computed_tokens == 0:
            self.cancel_reservation(migration_id)
            self._enqueue(self._take(spec, now))
            return None
        if not arrivals.intact(migration_id):
            return SubmitRefusal(RejectCode.INVALID, "what was here of its KV had to make room")
        request = self._take(spec, now)
        self._new_kv(request)
        coming = computed_tokens - arrivals.present(migration_id)
        blocks = self._staging.adopt(migration_id, request.request_id, coming)
        self._core.arrive(request, blocks, computed_tokens, migration_id)
        return None
