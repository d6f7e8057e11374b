"""The readers of other instances' KV that one instance keeps open, by the name of the pool they read.

A reader of another host says hello first, which takes seconds if that host cannot be reached. Only those who
want that very pool wait for it: other reads go on, and so does the engine thread, which closes readers. Used
by the instance server, from its copy threads and its engine thread.
"""

import threading
from concurrent.futures import CancelledError, Future

from llumnix.core.errors import TransportError
from llumnix.core.messages.control import KvEndpoint
from llumnix.migration.transports.base import BlockReader, ReaderFactory

READERS_MAX = 64


class OpenReaders:
    """At most READERS_MAX readers; the one opened first goes for a new one. A reader that is closed while it
    reads finishes or fails that read by itself."""

    def __init__(self, factory: ReaderFactory) -> None:
        self._factory = factory
        self._lock = threading.Lock()
        self._readers: dict[str, Future[BlockReader]] = {}

    def get(self, endpoint: KvEndpoint) -> BlockReader:
        """The reader of a pool; opens it if need be. Raises what the factory raises, and TransportError if
        another thread tried to open it just now and failed."""
        name = endpoint.pool_name
        with self._lock:
            known = self._readers.get(name)
            if known is None:
                if len(self._readers) >= READERS_MAX:
                    self._readers.pop(next(iter(self._readers))).add_done_callback(_close)
                mine: Future[BlockReader] = Future()
                self._readers[name] = mine
        if known is not None:
            try:
                return known.result()
            except CancelledError as error:
                raise TransportError(f"pool {name} could not be opened") from error
        try:
            reader = self._factory.open(endpoint)
            mine.set_result(reader)
            return reader
        finally:
            if mine.cancel():  # open failed: whoever comes next tries anew
                with self._lock:
                    if self._readers.get(name) is mine:
                        del self._readers[name]

    def close(self, pool_name: str) -> None:
        """Close the reader of a pool, if there is one; one that is being opened, as soon as it is."""
        with self._lock:
            reader = self._readers.pop(pool_name, None)
        if reader is not None:
            reader.add_done_callback(_close)

    def close_all(self) -> None:
        """Close every reader."""
        for pool_name in list(self._readers):
            self.close(pool_name)


def _close(opened: "Future[BlockReader]") -> None:
    if not opened.cancelled():
        opened.result().close()
