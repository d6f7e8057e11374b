"""Between instances of one process: pools find each other by name, and a run is one copy.

A process offers a pool (``offer``) when it makes an instance, and withdraws it before the pool is closed.
"""

import os
import threading

from llumnix.core.errors import TransportError
from llumnix.core.messages.control import KvEndpoint
from llumnix.migration.transports.bandwidth import TokenBucket
from llumnix.migration.transports.base import BlockPool, host_identity
from llumnix.migration.transports.memory import MemoryReader, SourceMemory

_pools: dict[str, BlockPool] = {}
_lock = threading.Lock()


def offer(pool: BlockPool) -> None:
    """Let other instances of this process read ``pool``. Raises TransportError if its name is taken."""
    with _lock:
        if _pools.setdefault(pool.pool_name, pool) is not pool:
            raise TransportError(f"two KV pools of this process are called {pool.pool_name}")


def withdraw(pool: BlockPool) -> None:
    """Nobody opens ``pool`` any more. One that was not offered is ignored."""
    with _lock:
        if _pools.get(pool.pool_name) is pool:
            del _pools[pool.pool_name]


def open_in_process(
    endpoint: KvEndpoint, pool: BlockPool, bucket: TokenBucket, copy_share: float
) -> MemoryReader:
    """A reader of a pool of this very process. Raises TransportError with the reason if it is not one."""
    if endpoint.host != host_identity() or endpoint.pid != os.getpid():
        raise TransportError("the source is another process")
    with _lock:
        source = _pools.get(endpoint.pool_name)
    if source is None:
        raise TransportError(f"no pool called {endpoint.pool_name} in this process")
    if source.layout.block_bytes != pool.layout.block_bytes:
        raise TransportError(
            f"blocks of {source.layout.block_bytes} bytes do not fit blocks of {pool.layout.block_bytes}"
        )
    rows = source.bytes_view()
    if rows.device != pool.bytes_view().device:
        raise TransportError(f"the pools are on {rows.device} and {pool.bytes_view().device}")
    return MemoryReader(SourceMemory(len(rows), rows.data_ptr(), rows), pool, bucket, copy_share)
