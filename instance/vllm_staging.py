"""The blocks of the pool that peers read, and the copying of moving requests' KV into it.

vLLM's KV lies in vLLM's layout; what travels lies in the pool, in ours. While a request that is to move keeps
running, a copy thread brings over what is full: tokens once computed never change while vLLM holds their
blocks. Should vLLM take them away meanwhile (preemption, end), the bytes are meaningless, and the engine
notices before anyone is told of them. What the target has already is not brought over: a request's blocks in
the pool begin behind that. A pool block belongs to a request (one that leaves, or that has come
and whose KV vLLM has not taken in yet) or to a reservation. Used by the engine adapter, between steps.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from llumnix.core.errors import InvariantError
from llumnix.instance.block_manager import BlockManager
from llumnix.instance.vllm_exchange import Exchange

COPY_TOKENS_MAX = 2048
"""Tokens of one job of the copy thread, so that nobody waits long for one that is no longer wanted."""


@dataclass(slots=True)
class Copying:
    """A request whose KV is being brought over from its token ``first`` on: up to ``copied`` it is in the
    pool, up to ``coming`` it will be once ``job`` is done."""

    first: int = 0
    copied: int = 0
    coming: int = 0
    job: "Future[None] | None" = None


class Staging:
    """See the module. ``blocks`` are those of the pool."""

    def __init__(self, exchange: Exchange) -> None:
        layout = exchange.pool.layout
        self.blocks = BlockManager(layout.blocks)
        self._exchange = exchange
        self._size = layout.block_size
        self._copying: dict[str, Copying] = {}
        self._owners: set[str] = set()
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="kv-out")

    def begin(self, request_id: str, first: int, tokens: int) -> bool:
        """Keep room for tokens ``first … tokens - 1`` of a request that is to move; blocks of vLLM and of the
        pool both begin at ``first``. False: there is none."""
        if not self._room(request_id, tokens - first):
            return False
        self._copying[request_id] = Copying(first, first, first)
        return True

    def adopt(self, migration_id: str, request_id: str, tokens: int) -> tuple[int, ...]:
        """Turn a reservation into a request's blocks, as many as so many tokens fill, and return those."""
        self.blocks.adopt(migration_id, request_id)
        self.blocks.trim(request_id, -(-tokens // self._size))
        self._owners.add(request_id)
        return self._table(request_id)

    def copied(self, request_id: str, vllm_id: str, computed: int) -> tuple[tuple[int, ...], int] | None:
        """Go on copying a moving request of which ``computed`` tokens have KV. Returns the pool blocks for
        them, from where it began, and how many tokens of full blocks are there, those not brought over
        included. None: the pool is full."""
        state = self._copying[request_id]
        if not self._room(request_id, computed - state.first):
            return None
        if state.job is not None and state.job.done():
            state.job.result()
            state.job, state.copied = None, state.coming
        full = computed // self._size * self._size
        if state.job is None and full > state.copied:
            state.coming = min(full, state.copied + COPY_TOKENS_MAX)
            blocks, table = tuple(self._exchange.blocks_of(vllm_id)), self._table(request_id)
            state.job = self._copier.submit(
                self._copy, blocks, table, state.first, state.copied, state.coming
            )
        return self._filled(request_id, computed - state.first), state.copied

    def finish(self, request_id: str, vllm_id: str, computed: int) -> tuple[int, ...]:
        """Bring over the rest at once, since the request is about to leave vLLM's batch. Returns the pool
        blocks that hold its KV. ``copied`` has just found room for them."""
        state = self._copying.pop(request_id, None) or Copying()
        if state.job is not None:
            state.job.result()
            state.copied = state.coming
        if not self._room(request_id, computed - state.first):
            raise InvariantError(f"no room in the pool for the last blocks of {request_id}")
        blocks, table = tuple(self._exchange.blocks_of(vllm_id)), self._table(request_id)
        self._copy(blocks, table, state.first, state.copied, computed)
        return self._filled(request_id, computed - state.first)

    def moving(self, request_id: str) -> bool:
        """Whether a request's KV is being brought over."""
        return request_id in self._copying

    def began_at(self, request_id: str) -> int:
        """The first token of a moving request that is brought over."""
        return self._copying[request_id].first

    def stop(self, request_id: str) -> None:
        """A request stays, or is gone: give its blocks back, once nothing writes to them any more."""
        state = self._copying.pop(request_id, None)
        if state is not None and state.job is not None:
            state.job.result()
        if request_id in self._owners:
            self._owners.remove(request_id)
            self.blocks.free(request_id)

    def close(self) -> None:
        """No more copying."""
        self._copier.shutdown(wait=True, cancel_futures=True)

    def _room(self, request_id: str, tokens: int) -> bool:
        held = len(self._table(request_id)) if request_id in self._owners else 0
        missing = -(-tokens // self._size) - held
        if missing > 0 and not self.blocks.grow(request_id, missing):
            return False
        self._owners.add(request_id)
        return True

    def _table(self, request_id: str) -> tuple[int, ...]:
        return tuple(self.blocks.table(request_id))

    def _filled(self, request_id: str, tokens: int) -> tuple[int, ...]:
        return self._table(request_id)[: -(-tokens // self._size)]

    def _copy(
        self, blocks: Sequence[int], pool_blocks: Sequence[int], begin: int, first: int, end: int
    ) -> None:
        """Tokens ``first … end - 1``; ``pool_blocks`` begin at token ``begin``."""
        if end > first:
            exchange, size = self._exchange, self._exchange.copier.shape.block_size
            if len(blocks) * size < end:
                raise InvariantError(f"vLLM has {len(blocks)} blocks for KV of {end} tokens")
            behind, first, end = blocks[begin // size :], first - begin, end - begin
            with torch.inference_mode():
                exchange.copier.copy_out(exchange.pool, behind, pool_blocks, first=first, end=end)
