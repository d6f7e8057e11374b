"""The message bus: how processes of a cluster hand each other wire messages, and learn that a peer is gone.

One `Bus` per process. It takes messages on one ZeroMQ PULL socket and sends on one PUSH socket per peer, all
in the thread of its event loop; nothing here ever blocks. Delivery is in order per peer while the connection
lasts. A full queue or a broken connection loses messages: the cores are built for that. A broken connection
also drops what was still queued for the peer, and is reported once to ``on_lost``, which is how a killed
process is noticed within milliseconds. Bytes that are no message, and messages nobody here takes
(ProtocolError), are dropped and counted.
"""

import asyncio
import errno
import logging
import resource
from collections import OrderedDict
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from llumnix.core.codec import MESSAGE_BYTES_MAX, decode, encode
from llumnix.core.errors import ProtocolError

log = logging.getLogger(__name__)

QUEUED_MESSAGES_MAX = 50_000  # per peer and direction
PEERS_MAX = 4096
PEER_SOCKETS = 3  # ZeroMQ's count: the one that sends, and both ends of its monitor
PEER_FILES = 5  # a signal for each of those, and a connection each way
RECEIVE_BURST = 256
HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 4000

_LOST_EVENTS = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class Bus:
    """Must be made, used and closed in the thread of ``loop``; other threads go through
    call_soon_threadsafe."""

    def __init__(
        self,
        bind_host: str,
        *,
        on_message: Callable[[object], None],
        on_lost: Callable[[str], None],
        port: int = 0,
    ) -> None:
        """Bind to ``bind_host``; ``port`` 0 takes a free one. Raises zmq.ZMQError if the port is taken."""
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_lost = on_lost
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, PEER_SOCKETS * (PEERS_MAX + 1))
        _allow_files(PEER_FILES * PEERS_MAX)
        self._inbox = self._socket(zmq.PULL)
        self._inbox.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        bound = self._inbox.bind_to_random_port(f"tcp://{bind_host}") if port == 0 else port
        if port:
            self._inbox.bind(f"tcp://{bind_host}:{port}")
        self.address = f"tcp://{bind_host}:{bound}"
        self.dropped = 0
        self._peers: OrderedDict[str, tuple[zmq.Socket[bytes], zmq.Socket[bytes]]] = OrderedDict()
        self._closed = False
        self._loop.add_reader(self._inbox.fileno(), self._receive)
        self._loop.call_soon(self._receive)

    def send(self, address: str, message: object) -> bool:
        """Queue a message. False: it was dropped, as the peer's queue is full, there is no such address, or
        this process may open no more connections."""
        if self._closed:
            return False
        try:
            self._peer(address).send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1
            return False
        except zmq.ZMQError as error:
            self.dropped += 1
            log.warning("dropped a %s for %r: %s", type(message).__name__, address, error)
            if error.errno == errno.EMFILE:
                self._make_room()
            return False
        return True

    def close(self) -> None:
        """Stop at once; what is still queued is given a moment to leave, then dropped."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._inbox.fileno())
        self._inbox.close(linger=0)
        for address in list(self._peers):
            self._drop_peer(address, linger_ms=200)
        self._context.term()

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES_MAX)
        socket.setsockopt(zmq.RCVHWM, QUEUED_MESSAGES_MAX)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        return socket

    def _peer(self, address: str) -> "zmq.Socket[bytes]":
        known = self._peers.get(address)
        if known is not None:
            self._peers.move_to_end(address)
            return known[0]
        if len(self._peers) >= PEERS_MAX:
            self._drop_peer(next(iter(self._peers)), linger_ms=200)
        socket = self._socket(zmq.PUSH)
        try:
            monitor = socket.get_monitor_socket(_LOST_EVENTS)
        except zmq.ZMQError:
            socket.disable_monitor()
            socket.close(linger=0)  # one that is open when the context is to end would hold it up for ever
            raise
        self._peers[address] = (socket, monitor)
        self._loop.add_reader(monitor.fileno(), self._watch, address, monitor)
        try:
            socket.connect(address)
        except zmq.ZMQError:
            self._drop_peer(address)
            raise
        self._loop.call_soon(self._watch, address, monitor)
        return socket

    def _make_room(self) -> None:
        """Give up whoever was not spoken to for longest, so that the next message finds an open file."""
        if self._peers:
            self._drop_peer(next(iter(self._peers)), linger_ms=200)

    def _drop_peer(self, address: str, linger_ms: int = 0) -> None:
        socket, monitor = self._peers.pop(address)
        self._loop.remove_reader(monitor.fileno())
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close(linger=linger_ms)

    def _watch(self, address: str, monitor: "zmq.Socket[bytes]") -> None:
        known = self._peers.get(address)
        if self._closed or known is None or known[1] is not monitor:
            return
        try:
            event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return
        log.debug("connection to %s lost: %s", address, event["event"])
        self._drop_peer(address)
        self._on_lost(address)

    def _receive(self) -> None:
        if self._closed:
            return
        # Also if a message breaks its reader: ZeroMQ tells of what is still there only once.
        again = self._loop.call_soon(self._receive)
        for _ in range(RECEIVE_BURST):
            try:
                data = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                again.cancel()
                return
            try:
                self._on_message(decode(data))
            except ProtocolError as error:
                self.dropped += 1
                log.warning("dropped a message of %d bytes: %s", len(data), error)


def _allow_files(wanted: int) -> None:
    """Raise this process's soft limit of open files, often 1024, towards that, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
