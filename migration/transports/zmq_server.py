"""Serves an instance's blocks to readers on other hosts, from a thread of its own.

Host memory is handed to ZeroMQ as it lies in the pool, without a copy. A GPU's goes through pinned
memory. Every request gets one answer; a bad one gets its reason and changes nothing. Made by whoever runs
an instance.
"""

import threading
from collections.abc import Sequence

import torch
import zmq

from llumnix.core.errors import TransportError
from llumnix.migration.transports.base import BlockPool
from llumnix.migration.transports.zmq_wire import (
    CHUNK_BYTES,
    CHUNKS_IN_FLIGHT_MAX,
    POOL_NAME_BYTES_MAX,
    ChunkRequest,
    decode_request,
    encode_answer,
)

REQUEST_BYTES_MAX = POOL_NAME_BYTES_MAX
READERS_MAX = 4096


class BlockServer:
    """Serves ``pools``, told apart by name, at ``address`` until closed. Raises TransportError if nothing can
    listen on ``bind_host``."""

    def __init__(self, pools: Sequence[BlockPool], bind_host: str) -> None:
        self._pools = {pool.pool_name: pool for pool in pools}
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, REQUEST_BYTES_MAX)
        self._socket.setsockopt(zmq.SNDHWM, 2 * CHUNKS_IN_FLIGHT_MAX)
        self._socket.setsockopt(zmq.RCVHWM, READERS_MAX)
        self._stop_here, self._stop_there = self._pair()
        try:
            port = self._socket.bind_to_random_port(f"tcp://{bind_host}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise TransportError(f"blocks cannot be served on {bind_host}: {error}") from error
        self.address = f"tcp://{bind_host}:{port}"
        self.refused = 0
        self._thread = threading.Thread(target=self._serve, name="kv-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving. Answers not sent yet are dropped; the pool may be given up afterwards."""
        if self._thread.is_alive():
            self._stop_here.send(b"")
            self._thread.join()
        self._stop_here.close(linger=0)
        self._context.term()

    def _pair(self) -> tuple["zmq.Socket[bytes]", "zmq.Socket[bytes]"]:
        here, there = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        there.bind("inproc://stop")
        here.connect("inproc://stop")
        return here, there

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop_there, zmq.POLLIN)
        while self._stop_there not in dict(poller.poll()):
            frames = self._socket.recv_multipart()
            self._answer(frames[0], frames[1:])
        self._socket.close(linger=0)
        self._stop_there.close(linger=0)

    def _answer(self, reader: bytes, frames: list[bytes]) -> None:
        number = 0
        try:
            request = decode_request(frames)
            number = request.number
            rows = self._rows(request)
        except TransportError as error:
            self.refused += 1
            self._socket.send_multipart([reader, encode_answer(number, ok=False), str(error).encode()])
            return
        self._socket.send_multipart([reader, encode_answer(number, ok=True)], zmq.SNDMORE)
        self._socket.send(rows.numpy().data, copy=False)

    def _rows(self, request: ChunkRequest) -> torch.Tensor:
        pool = self._pools.get(request.pool_name)
        if pool is None:
            raise TransportError(f"this is pool {' and '.join(self._pools)}, not {request.pool_name}")
        view, layout = pool.bytes_view(), pool.layout
        if request.first + request.count > len(view):
            raise TransportError(f"blocks {request.first} + {request.count} of a pool of {len(view)}")
        if request.count > max(1, CHUNK_BYTES // layout.block_bytes):
            raise TransportError(f"{request.count} blocks are more than one answer may carry")
        rows = view[request.first : request.first + request.count]
        if rows.is_cuda and request.count:
            staging = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            rows = staging.copy_(rows)
        return rows
