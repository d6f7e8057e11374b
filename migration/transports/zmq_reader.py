"""Reads blocks of an instance on another host through its block server.

Each read has a socket to itself while it runs, so that the last blocks of one request never queue behind
the bulk of another. Chunks are asked for ahead, a few at a time, and each answer is copied once, from
ZeroMQ's memory to the pool. A broken connection fails the read at once, silence after its timeout.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
import zmq

from llumnix.core.errors import TransportError
from llumnix.core.messages.control import KvEndpoint
from llumnix.migration.transports.bandwidth import TokenBucket
from llumnix.migration.transports.base import BlockPool, ReadStats
from llumnix.migration.transports.runs import Run, plan_runs
from llumnix.migration.transports.zmq_wire import (
    CHUNK_BYTES,
    CHUNKS_IN_FLIGHT_MAX,
    ChunkRequest,
    decode_answer,
)

IDLE_CONNECTIONS_MAX = 4
CONNECT_TIMEOUT_S = 2.0
REFUSAL_CHARS_MAX = 300
LOST_EVENTS = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
"""How libzmq reports that a peer has gone; a refused first connection is CLOSED."""


class ZmqReader:
    """A BlockReader over ZeroMQ. Raises TransportError if the pool is not served at ``endpoint.address``."""

    def __init__(self, endpoint: KvEndpoint, pool: BlockPool, bucket: TokenBucket, copy_share: float) -> None:
        """``copy_share`` means nothing here: the network is what takes the time."""
        self._endpoint = endpoint
        self._pool = pool
        self._bucket = bucket
        self._context = zmq.Context(io_threads=1)
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._open = 0
        self._closing = False
        try:
            self._with_connection(lambda connection: connection.ping(CONNECT_TIMEOUT_S))
        except TransportError:
            self.close()
            raise

    def read(
        self,
        source_blocks: Sequence[int],
        target_blocks: Sequence[int],
        timeout_s: float,
        *,
        urgent: bool = False,
        rests: bool = True,
    ) -> ReadStats:
        """``rests`` means nothing here: the network is what takes the time."""
        started = perf_counter()
        target, block_bytes = self._pool.bytes_view(), self._pool.layout.block_bytes
        chunk = max(1, self._bucket.chunk_bytes(CHUNK_BYTES) // block_bytes)
        runs = plan_runs(source_blocks, target_blocks, target_total=len(target), blocks_max=chunk)
        kv_bytes = len(source_blocks) * block_bytes

        def transfer(connection: "_Connection") -> None:
            asked = 0
            for done, run in enumerate(runs):
                while asked < min(len(runs), done + CHUNKS_IN_FLIGHT_MAX):
                    self._bucket.pass_bytes(runs[asked].count * block_bytes, urgent=urgent)
                    connection.ask(runs[asked].source, runs[asked].count)
                    asked += 1
                _store(connection.answer(run.count * block_bytes, timeout_s), target, run, block_bytes)

        self._with_connection(transfer)
        duration_s = perf_counter() - started
        return ReadStats(kv_bytes, len(runs), duration_s, duration_s)

    def close(self) -> None:
        """A read under way goes on to its end."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            idle, self._idle = self._idle, []
            self._open -= len(idle)
            last = self._open == 0
        for connection in idle:
            connection.close()
        if last:
            self._context.term()

    def _with_connection(self, use: "Callable[[_Connection], None]") -> None:
        with self._lock:
            if self._closing:
                raise TransportError("the reader is closed")
            connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = _Connection(self._context, self._endpoint)
                self._open += 1
        usable = False
        try:
            use(connection)
            usable = True
        except zmq.ZMQError as error:
            raise TransportError(
                f"{self._endpoint.pool_name} at {self._endpoint.address}: {error}"
            ) from error
        finally:
            self._leave(connection, usable)

    def _leave(self, connection: "_Connection", usable: bool) -> None:
        with self._lock:
            if usable and not self._closing and len(self._idle) < IDLE_CONNECTIONS_MAX:
                self._idle.append(connection)
                return
            self._open -= 1
            last = self._closing and self._open == 0
        connection.close()
        if last:
            self._context.term()


class _Connection:
    """One socket and the numbering of its requests. Used by one thread at a time. Raises TransportError if
    there is no socket to be had, or no such address."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: KvEndpoint) -> None:
        self._endpoint = endpoint
        self._asked = 0
        self._answered = 0
        sockets: list[zmq.Socket[bytes]] = []
        try:
            self._socket = context.socket(zmq.DEALER)
            sockets.append(self._socket)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._monitor = self._socket.get_monitor_socket(LOST_EVENTS)
            sockets.append(self._monitor)
            self._socket.connect(endpoint.address)
        except zmq.ZMQError as error:
            for socket in sockets:  # one left open would keep its context from ever ending
                socket.close(linger=0)
            raise TransportError(f"no connection to {endpoint.address!r}: {error}") from error
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def ping(self, timeout_s: float) -> None:
        """Ask for nothing, to see whether the pool is served there."""
        self.ask(0, 0)
        self.answer(0, timeout_s)

    def ask(self, first: int, count: int) -> None:
        self._asked += 1
        request = ChunkRequest(self._asked, first, count, self._endpoint.pool_name)
        self._socket.send_multipart(request.encode())

    def answer(self, size_bytes: int, timeout_s: float) -> memoryview:
        """The bytes asked for next. Raises TransportError for a refusal, a loss, silence or the wrong
        bytes."""
        ready = dict(self._poller.poll(max(1, int(timeout_s * 1e3))))
        if self._socket not in ready:
            how = "closed the connection" if ready else f"said nothing for {timeout_s:g} s"
            raise TransportError(f"{self._endpoint.pool_name} at {self._endpoint.address} {how}")
        frames = self._socket.recv_multipart(copy=False)
        number, ok = decode_answer(frames[0].bytes)
        self._answered += 1
        if not ok or len(frames) != 2:
            raise TransportError(f"refused: {frames[-1].bytes.decode(errors='replace')[:REFUSAL_CHARS_MAX]}")
        if number != self._answered or len(frames[1].buffer) != size_bytes:
            raise TransportError(f"answer {number} of {len(frames[1].buffer)} bytes was not asked for")
        return frames[1].buffer

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)


def _store(data: memoryview, target: torch.Tensor, run: Run, block_bytes: int) -> None:
    received = np.frombuffer(data, dtype=np.uint8)
    if target.is_cuda:
        staging = torch.empty(len(received), dtype=torch.uint8, pin_memory=True)
        ctypes.memmove(staging.data_ptr(), received.ctypes.data, len(received))
        target[run.target : run.target + run.count].copy_(staging.view(run.count, block_bytes))
    else:
        address = target.data_ptr() + run.target * block_bytes
        ctypes.memmove(address, received.ctypes.data, len(received))
