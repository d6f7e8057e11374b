"""Picks the transport: what an instance uses to read from whichever peer a request comes from.

The order is that of speed: same process, same host, network. Made once per instance by whoever runs it.
"""

import time
from collections.abc import Callable

from llumnix.core.config import MigrationConfig
from llumnix.core.errors import TransportError
from llumnix.core.messages.control import KvEndpoint
from llumnix.migration.transports.bandwidth import TokenBucket
from llumnix.migration.transports.base import BlockPool, BlockReader
from llumnix.migration.transports.inprocess import open_in_process
from llumnix.migration.transports.shm import open_shared_memory
from llumnix.migration.transports.zmq_reader import ZmqReader

MIB = 1 << 20

Opener = Callable[[KvEndpoint, BlockPool, TokenBucket, float], BlockReader]

TRANSPORTS: dict[str, Opener] = {
    "inprocess": open_in_process,
    "shm": open_shared_memory,
    "zmq": ZmqReader,
}
"""By name, fastest first."""


class Readers:
    """The ReaderFactory of one instance, whose own pool is ``pool``. All its readers share one bandwidth
    cap."""

    def __init__(self, pool: BlockPool, config: MigrationConfig) -> None:
        self._pool = pool
        self._transport = config.transport
        self._copy_share = config.copy_share
        self._bucket = TokenBucket(config.bandwidth_mib_s * MIB, clock=time.monotonic, sleep=time.sleep)

    def open(self, endpoint: KvEndpoint) -> BlockReader:
        names = tuple(TRANSPORTS) if self._transport == "auto" else (self._transport,)
        reasons = []
        for name in names:
            try:
                return TRANSPORTS[name](endpoint, self._pool, self._bucket, self._copy_share)
            except TransportError as error:
                reasons.append(f"{name}: {error}")
        where = f"pool {endpoint.pool_name} of process {endpoint.pid} at {endpoint.address}"
        raise TransportError(f"no transport reaches {where}: {'; '.join(reasons)}")
