"""What the engine adapter and the connector inside vLLM tell each other. Both live in one process and take
turns: the connector's scheduler side writes while vLLM schedules, its worker side while it computes, the
engine between steps. vLLM makes the connector itself and hands it nothing but settings, so the two meet here
by name. Under tensor parallelism the worker side is in processes of its own, and has a Rank (vllm_rank.py) in
place of an Exchange.

Bounded: ``live`` and ``imports`` hold requests that vLLM holds, ``loads`` those of one step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import KvLayout
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.vllm_layout import BlockShape

EXCHANGE = "llumnix_exchange"
BLOCK_SIZE = "llumnix_block_size"
"""What vLLM hands its connectors from vllm_launch.py: the name they meet by, and tokens per pool block."""


@dataclass(frozen=True, slots=True)
class Import:
    """KV that waits in the pool for a request that vLLM has been given: of its tokens ``first … tokens - 1``,
    where blocks of vLLM and of the pool both begin at ``first``. What is before is in vLLM's prefix cache; if
    vLLM has lost it, none of this is of use."""

    pool_blocks: tuple[int, ...]
    first: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be loaded of an import that vLLM has found room for, as BlockCopier.copy_in is told."""

    pool_blocks: tuple[int, ...]
    blocks: tuple[int, ...]
    first: int
    end: int


class BlockCopier(Protocol):
    """Moves the KV of ranges of a request's tokens between vLLM's blocks and those of the pool: a KvCopier of
    this process, or all ranks together. ``shape`` counts the heads of all ranks. May be used from any
    thread, as long as nobody else writes to the same blocks meanwhile."""

    @property
    def shape(self) -> BlockShape: ...

    def copy_out(
        self, pool: KvPool, blocks: Sequence[int], pool_blocks: Sequence[int], *, first: int, end: int
    ) -> None:
        """Tokens ``first … end - 1`` of a request that has ``blocks`` in vLLM, to its ``pool_blocks``. Both
        lists begin at token 0; ``first`` is where a pool block begins. What lies behind ``end`` in the last
        pool block is unspecified."""
        ...

    def copy_in(
        self, pool: KvPool, pool_blocks: Sequence[int], blocks: Sequence[int], *, first: int, end: int
    ) -> None:
        """The other way. ``first`` is where a block of vLLM begins; what lies behind ``end`` in vLLM's last
        block is unspecified."""
        ...


@dataclass(eq=False)
class Exchange:
    """``live`` are vLLM's own request objects by its ids, to be read only. ``block_pool`` is its block pool;
    ``free_blocks`` and ``blocks_of`` ask it. ``make_pool`` is called once the shape of the KV is known."""

    make_pool: Callable[[KvLayout], KvPool]
    live: dict[str, Any] = field(default_factory=dict)
    imports: dict[str, Import] = field(default_factory=dict)
    scheduled_tokens: int = 0
    block_pool: Any = None
    free_blocks: Callable[[], int] = lambda: 0
    blocks_of: Callable[[str], Sequence[int]] = lambda vllm_id: ()
    _pool: KvPool | None = None
    _copier: BlockCopier | None = None

    @property
    def pool(self) -> KvPool:
        """The pool that peers read."""
        if self._pool is None:
            raise InvariantError("vLLM has not told about its KV yet")
        return self._pool

    @property
    def copier(self) -> BlockCopier:
        """The way in and out of vLLM's KV."""
        if self._copier is None:
            raise InvariantError("vLLM has not told about its KV yet")
        return self._copier

    def whole_blocks(self, tokens: int) -> int:
        """The most of a request's first ``tokens`` tokens that end both a block of vLLM and one of the
        pool."""
        unit = math.lcm(self.pool.layout.block_size, self.copier.shape.block_size)
        return tokens // unit * unit

    def ready(self, pool: KvPool, copier: BlockCopier) -> None:
        """vLLM has its KV."""
        self._pool, self._copier = pool, copier

    def take_in(self, load: Load) -> None:
        """Fill a request's blocks in vLLM from the pool."""
        self.copier.copy_in(self.pool, load.pool_blocks, load.blocks, first=load.first, end=load.end)

    def know(self, layout: KvLayout, copier: BlockCopier) -> None:
        """vLLM has its KV, in this process: make the pool."""
        self.ready(self.make_pool(layout), copier)


_exchanges: dict[str, Exchange] = {}


def offer(name: str, exchange: Exchange) -> None:
    """Let the connector of the engine that is about to start find its exchange."""
    _exchanges[name] = exchange


def find(name: str) -> Exchange:
    """The exchange offered under this name."""
    if name not in _exchanges:
        raise InvariantError(f"no engine of this process offers the exchange {name}")
    return _exchanges[name]


def withdraw(name: str) -> None:
    """The engine has ended."""
    _exchanges.pop(name, None)
