"""What block server and reader say to each other over ZeroMQ: a fixed header, then bytes.

A request names a chunk of consecutive blocks and gets exactly one answer, OK with the chunk's bytes or a
refusal with a text. A reader keeps CHUNKS_IN_FLIGHT_MAX requests open, which is all the memory a slow one
can bind.
"""

import struct
from dataclasses import dataclass

from llumnix.core.errors import TransportError

MAGIC = 0x4C4B5631  # "LKV1"
CHUNK_BYTES = 4 << 20
CHUNKS_IN_FLIGHT_MAX = 4
POOL_NAME_BYTES_MAX = 255

_REQUEST = struct.Struct("<IQII")
_ANSWER = struct.Struct("<IQB")


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """``count`` blocks from ``first`` on of the pool called ``pool_name``; ``number`` comes back in the
    answer."""

    number: int
    first: int
    count: int
    pool_name: str

    def encode(self) -> list[bytes]:
        return [_REQUEST.pack(MAGIC, self.number, self.first, self.count), self.pool_name.encode()]


def decode_request(frames: list[bytes]) -> ChunkRequest:
    """Raises TransportError for anything that is no request."""
    if len(frames) != 2 or len(frames[0]) != _REQUEST.size or len(frames[1]) > POOL_NAME_BYTES_MAX:
        raise TransportError("not a request for blocks")
    magic, number, first, count = _REQUEST.unpack(frames[0])
    try:
        pool_name = frames[1].decode()
    except UnicodeDecodeError as error:
        raise TransportError("not a pool's name") from error
    if magic != MAGIC:
        raise TransportError(f"protocol {magic:#x}, not {MAGIC:#x}")
    return ChunkRequest(number, first, count, pool_name)


def encode_answer(number: int, *, ok: bool) -> bytes:
    """The header of an answer; its payload is the next frame."""
    return _ANSWER.pack(MAGIC, number, ok)


def decode_answer(header: bytes) -> tuple[int, bool]:
    """(request number, whether bytes follow rather than a refusal's text). Raises TransportError for
    anything else."""
    if len(header) != _ANSWER.size:
        raise TransportError("not an answer of a block server")
    magic, number, ok = _ANSWER.unpack(header)
    if magic != MAGIC:
        raise TransportError(f"protocol {magic:#x}, not {MAGIC:#x}")
    return number, bool(ok)
