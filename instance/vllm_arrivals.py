"""KV on its way into vLLM: each stage of a migration is brought into vLLM's own blocks as it comes, so that
little is left to load when the request itself joins.

An arrival has blocks that vLLM's block pool gave out through its own methods (a connector is handed the
pool for that). When the request joins, its full blocks are entered in vLLM's prefix cache under the hashes of
the request's own tokens and let go, last to be evicted; vLLM finds them there in its next step, and the
connector loads only what lies behind them. All that came is in the staging pool as well until then, so what
is taken back (vLLM needs the blocks, or evicts them) is merely loaded later.

What vLLM's prefix cache has of a request when its migration begins does not travel, and is not in the staging
pool: those blocks are held (vllm_holds.py), from then on until vLLM has taken the request in. All that is
said here of an arrival's own blocks begins behind them. If vLLM needs them before the request joins, the
request is not taken: it goes on where it is.

``load`` runs on copy threads, one read of a migration at a time; everything else between vLLM's steps, on the
engine's thread. Bounded by the migrations that may come in at once. Used by the engine adapter
(vllm_engine.py).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llumnix.core.messages.control import KvEndpoint
from llumnix.instance.vllm_exchange import Exchange
from llumnix.instance.vllm_holds import Hold, Holds
from llumnix.migration.transports.base import BlockReader, ReaderFactory, ReadStats

LOAD_TOKENS_MAX = 1024
"""Tokens loaded at a time, so that the engine's thread never waits long for blocks it wants back."""

GROUP = 0
"""vLLM's only group of layers; the connector refuses models with more."""


@dataclass(slots=True, eq=False)
class Arrival:
    """One migration. vLLM's prefix cache had the first ``present`` tokens before; ``hold``: in these blocks.
    Behind them, ``places``: where each block of the staging pool is; the first ``loaded`` tokens are in
    ``blocks``, vLLM's own. ``lock`` guards these two."""

    present: int = 0
    hold: Hold = field(default_factory=Hold)
    pool_blocks: tuple[int, ...] = ()
    places: dict[int, int] = field(default_factory=dict)
    blocks: list[Any] = field(default_factory=list)
    loaded: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Arrivals:
    """See the module."""

    def __init__(self, exchange: Exchange, holds: Holds) -> None:
        self._exchange = exchange
        self._holds = holds
        self._size = exchange.pool.layout.block_size
        self._vllm_size = exchange.copier.shape.block_size
        self._arriving: dict[str, Arrival] = {}

    @property
    def blocks(self) -> int:
        """How many of vLLM's own are taken here."""
        return sum(len(arrival.blocks) for arrival in self._arriving.values())

    def present(self, migration_id: str) -> int:
        """How many tokens of a request vLLM's prefix cache had when its migration began."""
        arrival = self._arriving.get(migration_id)
        return 0 if arrival is None else arrival.present

    @property
    def present_tokens(self) -> int:
        """Of all requests that are coming."""
        return sum(arrival.present for arrival in self._arriving.values())

    def intact(self, migration_id: str) -> bool:
        """Whether what was present still is, for certain."""
        arrival = self._arriving.get(migration_id)
        return arrival is None or arrival.present == len(arrival.hold.blocks) * self._vllm_size

    def begin(self, migration_id: str, hashes: Sequence[Any], keep_blocks: int) -> int:
        """A request with these block hashes of vLLM is about to come: hold what vLLM has of it, as far as
        ``keep_blocks`` stay free, and return how many of our blocks that fills."""
        pool, found = self._exchange.block_pool, list[Any]()
        spare = self._exchange.free_blocks() - keep_blocks
        for one in hashes:
            hit = pool.get_cached_block(one, [GROUP])
            spare -= hit is not None and hit[0].ref_cnt == 0
            if hit is None or spare < 0:
                break
            found += hit
        tokens = self._exchange.whole_blocks(len(found) * self._vllm_size)
        if tokens:
            hold = self._holds.hold(found[: tokens // self._vllm_size])
            self._arriving[migration_id] = Arrival(tokens, hold)
        return tokens // self._size

    def hold(self, migration_id: str, pool_blocks: Sequence[int], keep_blocks: int) -> None:
        """KV will come into these blocks of the staging pool, more than before: take blocks of vLLM for what
        will be full, as far as vLLM has more than ``keep_blocks`` free."""
        pool = self._exchange.block_pool
        if not pool.enable_caching:
            return
        arrival = self._arriving.setdefault(migration_id, Arrival())
        arrival.pool_blocks = tuple(pool_blocks)
        arrival.places = {block: place for place, block in enumerate(pool_blocks)}
        missing = len(pool_blocks) * self._size // self._vllm_size - len(arrival.blocks)
        count = min(missing, self._exchange.free_blocks() - keep_blocks)
        if count > 0:
            arrival.blocks += pool.get_new_blocks(count)

    def load(self, pool_blocks: Sequence[int], *, full: bool) -> None:
        """The next blocks of a migration have come into the staging pool: bring over what fills blocks of
        vLLM. ``full``: so is the last of these."""
        arrival = next((one for one in list(self._arriving.values()) if pool_blocks[0] in one.places), None)
        if arrival is None:
            return
        come = (arrival.places[pool_blocks[-1]] + full) * self._size
        while self._load_some(arrival, come):
            pass

    def join(self, migration_id: str, computed_tokens: int, live: Any) -> Hold:
        """The request has come: let vLLM find its full blocks for its own request object ``live``. Returns
        what is to be held until it has."""
        arrival = self._arriving.pop(migration_id, Arrival())
        full = min(arrival.loaded, computed_tokens - arrival.present) // self._vllm_size
        blocks, present = [*arrival.hold.blocks, *arrival.blocks[:full]], len(arrival.hold.blocks)
        pool = self._exchange.block_pool
        pool.cache_full_blocks(live, blocks, present, len(blocks), self._vllm_size, GROUP)
        self._free(arrival.blocks[full:])
        self._free(arrival.blocks[:full])
        return arrival.hold

    def let_go(self, migration_id: str) -> None:
        """Nothing comes of a migration. No read of it is under way."""
        arrival = self._arriving.pop(migration_id, None)
        if arrival is not None:
            self._free(arrival.blocks)
            self._holds.let_go(arrival.hold)

    def yield_blocks(self) -> None:
        """vLLM needs blocks: give back all that are taken. What has come is loaded when its request joins."""
        for arrival in self._arriving.values():
            with arrival.lock:
                blocks, arrival.blocks, arrival.loaded = arrival.blocks, [], 0
            self._free(blocks)

    def _load_some(self, arrival: Arrival, come: int) -> bool:
        """Whether there may be more to do."""
        exchange, size = self._exchange, self._vllm_size
        with arrival.lock:
            first = arrival.loaded
            most = first + max(size, LOAD_TOKENS_MAX // size * size)
            end = min(come // size * size, len(arrival.blocks) * size, most)
            if end <= first:
                return False
            blocks = [block.block_id for block in arrival.blocks]
            with torch.inference_mode():
                exchange.copier.copy_in(exchange.pool, arrival.pool_blocks, blocks, first=first, end=end)
            arrival.loaded = end
        return True

    def _free(self, blocks: Sequence[Any]) -> None:
        """The last first, as vLLM does it: a prefix is worth more than its end."""
        if blocks:
            self._exchange.block_pool.free_blocks(reversed(blocks))


class LoadingReaders:
    """Readers whose reads end once vLLM has what came: a ReaderFactory around the instance's own."""

    def __init__(self, inner: ReaderFactory, arrivals: Arrivals) -> None:
        self._inner = inner
        self._arrivals = arrivals

    def open(self, endpoint: KvEndpoint) -> BlockReader:
        return _LoadingReader(self._inner.open(endpoint), self._arrivals)


class _LoadingReader:
    def __init__(self, inner: BlockReader, arrivals: Arrivals) -> None:
        self._inner = inner
        self._arrivals = arrivals

    def read(
        self,
        source_blocks: Sequence[int],
        target_blocks: Sequence[int],
        timeout_s: float,
        *,
        urgent: bool = False,
        rests: bool = True,
    ) -> ReadStats:
        stats = self._inner.read(source_blocks, target_blocks, timeout_s, urgent=urgent, rests=rests)
        if target_blocks:
            self._arrivals.load(target_blocks, full=not urgent)
        return stats

    def close(self) -> None:
        self._inner.close()
