"""Between processes of one host: the source's memfd is mapped, read only, and a run is one copy from its
pool into ours.

The memfd is reached through /proc, by process id and descriptor. Both can be reused by strangers once the
source has died, so the file opened must carry the pool's name. A mapping outlives its process: reads stay
valid, and it is the protocol's part to know that the source is gone.
"""

import mmap
import os

import numpy as np

from llumnix.core.errors import TransportError
from llumnix.core.messages.control import KvEndpoint
from llumnix.migration.transports.bandwidth import TokenBucket
from llumnix.migration.transports.base import BlockPool, host_identity
from llumnix.migration.transports.memory import MemoryReader, SourceMemory


def open_shared_memory(
    endpoint: KvEndpoint, pool: BlockPool, bucket: TokenBucket, copy_share: float
) -> MemoryReader:
    """A reader of a pool in another process of this host. Raises TransportError with the reason if it
    cannot be."""
    if endpoint.host != host_identity():
        raise TransportError("the source is on another host, or in another process-id namespace")
    if endpoint.fd < 0 or pool.bytes_view().device.type != "cpu":
        raise TransportError("a pool of the two is not in shared memory")
    path = f"/proc/{endpoint.pid}/fd/{endpoint.fd}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TransportError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        # The descriptor just opened is asked, not the path: the path may name another file by now.
        name = os.readlink(f"/proc/self/fd/{fd}")
        if not name.startswith(f"/memfd:llumnix-{endpoint.pool_name} "):
            raise TransportError(f"{path} is {name}, not pool {endpoint.pool_name}")
        size_bytes, block_bytes = os.fstat(fd).st_size, pool.layout.block_bytes
        if size_bytes == 0 or size_bytes % block_bytes:
            raise TransportError(f"a pool of {size_bytes} bytes has no blocks of {block_bytes}")
        memory = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except OSError as error:
        raise TransportError(f"{path} cannot be mapped: {error.strerror}") from error
    finally:
        os.close(fd)
    mapped = np.frombuffer(memory, dtype=np.uint8)  # knows its address though it may not be written to
    memory_of_peer = SourceMemory(size_bytes // block_bytes, mapped.ctypes.data, mapped)
    return MemoryReader(memory_of_peer, pool, bucket, copy_share)
