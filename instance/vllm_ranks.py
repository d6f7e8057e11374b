"""The instance's side of its ranks: the processes that vLLM starts under tensor parallelism, one for each
device, each with its own part of every KV block.

What travels stays whole: the pool has the heads of all ranks, in memory that every rank maps, and a copy
between the pool and vLLM is ordered from all ranks at once, each of which carries out its part on threads of
its own. So `Ranks` stands where vLLM's KV would be in this process (a BlockCopier), and staging, arrivals and
migration know nothing of ranks. What a rank loads in a step (vllm_connector.py) it is told by vLLM.

The ranks stand and fall together: when one ends, the others are cut off and end too, and `lost` says why. An
instance that dies takes its ranks along, as its ends of their lines go. What they share loses its names once
they have started, so nothing is left of them, whoever is killed. One thread takes ranks in, one listens to
each; callers of ``copy_…`` wait on theirs. Bounded by the copies that callers wait for. Made by the engine
adapter (vllm_core.py).
"""

import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llumnix.core.errors import ConfigurationError, ProtocolError, TransportError
from llumnix.core.messages.ranks import (
    CopyDone,
    CopyOrder,
    PoolOffered,
    RankFailed,
    RankHello,
    RankReady,
)
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.vllm_exchange import Exchange
from llumnix.instance.vllm_heads import heads_of_rank
from llumnix.instance.vllm_layout import BlockShape
from llumnix.instance.vllm_rank_line import Line, address_of
from llumnix.instance.vllm_shared_names import names_of, take_away

COPY_TIMEOUT_S = 60.0
"""A bound only: ranks answer, or their lines end."""


@dataclass(eq=False)
class _Copy:
    """A copy under way: which ranks have yet to answer, and what went wrong."""

    missing: set[int]
    reason: str = ""
    done: threading.Event = field(default_factory=threading.Event)


class Ranks:
    """See the module. Listens from the start; the pool is made when the first rank knows its KV, and the
    exchange is ready once all do."""

    def __init__(self, exchange: Exchange, pool_name: str, count: int) -> None:
        self._exchange = exchange
        self._count = count
        self._lock = threading.Lock()
        self._taken_in: list[Line] = []
        self._lines: dict[int, Line] = {}
        self._ready: dict[int, RankReady] = {}
        self._pool: KvPool | None = None
        self._copies: dict[int, _Copy] = {}
        self._numbers = 0
        self._closing = self._cut = False
        self._lost = ""
        self._failure = ""
        self._keepers: tuple[int, ...] = ()
        self._others_names = names_of(os.getpid())
        self.shape = BlockShape(0, 0, 0, 0)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(address_of(pool_name))
        self._listener.listen(count)
        self._threads = [threading.Thread(target=self._take_in, name="ranks", daemon=True)]
        self._threads[0].start()

    @property
    def lost(self) -> str:
        """Why there is no vLLM any more; empty: there is."""
        return self._lost

    @property
    def failure(self) -> str:
        """What the first rank that could not start said; empty: none said anything."""
        return self._failure

    def copy_out(
        self, pool: KvPool, blocks: Sequence[int], pool_blocks: Sequence[int], *, first: int, end: int
    ) -> None:
        """See BlockCopier. Raises TransportError if a rank cannot or is gone."""
        self._copy(self._keepers, True, blocks, pool_blocks, first, end)

    def copy_in(
        self, pool: KvPool, pool_blocks: Sequence[int], blocks: Sequence[int], *, first: int, end: int
    ) -> None:
        """See BlockCopier. Raises TransportError if a rank cannot or is gone."""
        self._copy(range(self._count), False, blocks, pool_blocks, first, end)

    def started(self) -> None:
        """vLLM has started: whoever shares memory has mapped it and all are connected, so that no names are
        needed any more."""
        take_away(self._shared_names())

    def expect_end(self) -> None:
        """vLLM is about to end its processes in order."""
        self._closing = True

    def close(self) -> None:
        """Cut all lines, which ends ranks that are still there."""
        self._closing = True
        names = self._shared_names()
        self._cut_all()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # nobody listens any more
        for thread in list(self._threads):
            thread.join()
        self._listener.close()
        take_away(names)

    def _copy(
        self,
        ranks: Sequence[int],
        outward: bool,
        blocks: Sequence[int],
        pool_blocks: Sequence[int],
        first: int,
        end: int,
    ) -> None:
        with self._lock:
            if self._lost or len(self._lines) < self._count:
                raise TransportError(self._lost or "the ranks of vLLM are not there")
            self._numbers += 1
            number, copy = self._numbers, _Copy(set(ranks))
            self._copies[number] = copy
            lines = [self._lines[rank] for rank in ranks]
        order = CopyOrder(number, outward, tuple(blocks), tuple(pool_blocks), first, end)
        try:
            for line in lines:
                line.send(order)
            if not copy.done.wait(COPY_TIMEOUT_S):
                raise TransportError(f"ranks {sorted(copy.missing)} of vLLM did not copy in time")
        finally:
            with self._lock:
                self._copies.pop(number, None)
        if copy.reason:
            raise TransportError(copy.reason)

    # The threads.

    def _take_in(self) -> None:
        """One line for each rank; strangers are sent away."""
        while len(self._threads) <= self._count:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            line = Line(end)
            if self._closing or not line.same_user:
                line.close()
                continue
            with self._lock:
                self._taken_in.append(line)
                if self._cut:
                    line.cut()
            thread = threading.Thread(target=self._listen, args=(line,), name="rank", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _listen(self, line: Line) -> None:
        rank, reason = -1, ""
        try:
            hello = line.receive()
            if not isinstance(hello, RankHello) or not 0 <= hello.rank < self._count:
                raise ProtocolError(f"not a rank's hello: {hello!r}")
            rank = hello.rank
            with self._lock:
                if rank in self._lines:
                    raise ProtocolError(f"there is a rank {rank} already")
                self._lines[rank] = line
            while (message := line.receive()) is not None:
                self._heard(rank, line, message)
        except (ProtocolError, TransportError) as error:
            reason = str(error)
        self._ended(rank, line, reason)

    def _heard(self, rank: int, line: Line, message: object) -> None:
        if isinstance(message, CopyDone):
            self._copied(rank, message)
        elif isinstance(message, RankReady):
            self._know(rank, line, message)
        elif isinstance(message, RankFailed):
            self._failure = self._failure or message.reason
        else:
            raise ProtocolError(f"rank {rank} of vLLM said {type(message).__name__}")

    def _copied(self, rank: int, done: CopyDone) -> None:
        with self._lock:
            copy = self._copies.get(done.number)
            if copy is None:
                return
            copy.missing.discard(rank)
            copy.reason = copy.reason or done.reason
            if not copy.missing:
                copy.done.set()

    def _know(self, rank: int, line: Line, ready: RankReady) -> None:
        """A rank knows its KV: give it the pool. vLLM goes on once all have theirs."""
        reason = ""
        with self._lock:
            others = next(iter(self._ready.values()), ready)
            self._ready[rank] = ready
            try:
                if ready != others:
                    raise ConfigurationError(f"the KV of vLLM's ranks differs: {ready} and {others}")
                if self._pool is None:
                    self._pool = self._exchange.make_pool(replace(ready.layout, blocks=0))
                if self._pool.fd < 0:
                    raise ConfigurationError("tensor_parallel needs memory that processes share, as on Linux")
            except ConfigurationError as error:
                reason = str(error)
            pool, complete = self._pool, not reason and len(self._ready) == self._count
        if pool is None or reason:
            line.send(PoolOffered(ready.layout, reason))
            return
        if complete:
            heads = ready.layout.kv_heads
            self.shape = BlockShape(ready.vllm_blocks, ready.vllm_block_size, heads, ready.layout.head_dim)
            self._keepers = tuple(
                one for one in range(self._count) if heads_of_rank(one, self._count, heads).copies_out
            )
            self._exchange.ready(pool, self)
        line.send(PoolOffered(pool.layout, ""), pool.fd)

    def _ended(self, rank: int, line: Line, reason: str) -> None:
        if not self._closing:
            take_away(self._shared_names())  # first: once it is lost the process ends
            who = f"rank {rank}" if rank >= 0 else "a rank"
            self._lose(reason or f"{who} of vLLM has ended")
            self._cut_all()
        line.close()

    def _shared_names(self) -> frozenset[Path]:
        """Of memory that this process has mapped since, or a rank, and of where they listen."""
        with self._lock:
            pids = [os.getpid(), *(line.peer for line in self._lines.values())]
        return frozenset[Path]().union(*map(names_of, pids)) - self._others_names

    def _lose(self, reason: str) -> None:
        with self._lock:
            self._lost = self._lost or reason

    def _cut_all(self) -> None:
        """Those of ranks that have yet to come too."""
        with self._lock:
            self._cut = True
            for line in self._taken_in:
                line.cut()
            for copy in self._copies.values():
                copy.reason = copy.reason or self._lost or "the engine is being closed"
                copy.done.set()
