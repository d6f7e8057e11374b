"""The line between a vLLM instance and the process of one of its ranks: a Unix socket of this host, without a
name in any file system, so nothing stays behind. Its end is how each side learns that the other has died.

Messages are core/messages/ranks.py in the codec's form, each behind its length; the pool's descriptor travels
beside them. Used by vllm_ranks.py and vllm_rank.py.
"""

import hashlib
import os
import socket
import struct
from threading import Lock

from llumnix.core.codec import MESSAGE_BYTES_MAX, decode, encode
from llumnix.core.errors import ProtocolError, TransportError

LENGTH = struct.Struct("!I")
CREDENTIALS = struct.Struct("3i")  # process, user, group: what Linux says of a peer


def address_of(pool_name: str) -> str:
    """Where the instance with this pool listens for its ranks: in Linux's abstract namespace."""
    return "\0llumnix-ranks-" + hashlib.sha256(pool_name.encode()).hexdigest()


class Line:
    """One end. Any thread may send; one receives. ``peer`` is the process at the other end."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = Lock()
        raw = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        self.peer, self._peers_user, _ = CREDENTIALS.unpack(raw)

    @property
    def same_user(self) -> bool:
        """Whether the other end belongs to this user: the address is open to all of the host."""
        return bool(self._peers_user == os.getuid())

    def send(self, message: object, fd: int = -1) -> None:
        """Send one message, and a descriptor after it if there is one. Raises TransportError."""
        data = encode(message)
        try:
            with self._sending:
                self._socket.sendall(LENGTH.pack(len(data)) + data)
                if fd >= 0:
                    socket.send_fds(self._socket, [b"\0"], [fd])
        except OSError as error:
            raise TransportError(f"the line to a rank of vLLM is cut: {error}") from error

    def receive(self) -> object | None:
        """The next message; None once the line has ended. Raises ProtocolError."""
        head = self._exactly(LENGTH.size)
        if head is None:
            return None
        (length,) = LENGTH.unpack(head)
        if length > MESSAGE_BYTES_MAX:
            raise ProtocolError(f"message of {length} bytes is over the limit of {MESSAGE_BYTES_MAX}")
        data = self._exactly(length)
        return None if data is None else decode(data)

    def receive_fd(self) -> int:
        """The descriptor that follows the message just received. Raises TransportError."""
        found = socket.recv_fds(self._socket, 1, 1)[1]
        if len(found) != 1:
            raise TransportError("the pool's descriptor did not come")
        return found[0]

    def cut(self) -> None:
        """End it, for both sides and all threads."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other side was faster

    def close(self) -> None:
        """Give it up, once nobody receives any more."""
        self._socket.close()

    def _exactly(self, count: int) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            try:
                more = self._socket.recv(count - len(data))
            except OSError:
                return None
            if not more:
                return None
            data += more
        return bytes(data)
