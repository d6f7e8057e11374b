"""Streaming clients for ``llumnix bench frontend``: raw asyncio, since a thousand ordinary HTTP clients would
be the bottleneck. While the run lasts a client only notes when bytes arrived; they are taken apart
afterwards.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

DONE_EVENT = "[DONE]"


@dataclass(frozen=True, slots=True)
class Heard:
    """What one client got. ``chunks`` are (time, tokens) of each event with text, times from ``sent_at`` on
    the same clock. ``problem`` is empty for a stream that is complete and exactly what it should be."""

    sent_at: float
    ended_at: float
    chunks: tuple[tuple[float, int], ...]
    problem: str


class StreamingClient(asyncio.Protocol):
    """One request over one connection, closed by the server at its end."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._parts: list[tuple[float, bytes]] = []
        self.sent_at = 0.0
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.sent_at = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parts.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(time.perf_counter())

    def events(self) -> tuple[list[tuple[float, str]], int]:
        """Server-sent events with the time each was complete, and the HTTP status (0: no answer)."""
        return _events(self._parts)

    def heard(self, expected: str) -> Heard:
        """Take apart what came, and compare its text with what should have come."""
        ended_at = self.ended.result()
        events, status = self.events()
        if status != 200:
            return Heard(self.sent_at, ended_at, (), f"HTTP {status}: {[text for _, text in events][:1]}")
        chunks: list[tuple[float, int]] = []
        said, problem, done = "", "", False
        for at, event in events:
            if event == DONE_EVENT:
                done = True
                continue
            body = json.loads(event)
            if "error" in body:
                problem = f"error event: {body['error']['message']}"
            elif body["choices"] and body["choices"][0]["text"]:
                text = body["choices"][0]["text"]
                said += text
                chunks.append((at, len(text)))  # the simulated model's tokens are one character each
        if not problem and (not done or said != expected):
            problem = (
                f"{len(said)} of {len(expected)} tokens, right up to {_common(said, expected)}, done: {done}"
            )
        return Heard(self.sent_at, ended_at, tuple(chunks), problem)


async def run_clients(
    host: str, port: int, requests: Sequence[bytes], ramp_s: float
) -> list[StreamingClient]:
    """Send the requests evenly over ``ramp_s`` and wait for the ends of all."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def one(number: int, request: bytes) -> StreamingClient:
        await asyncio.sleep(began + ramp_s * number / len(requests) - loop.time())
        _, client = await loop.create_connection(lambda: StreamingClient(request), host, port)
        await client.ended
        return client

    return list(await asyncio.gather(*[one(number, request) for number, request in enumerate(requests)]))


def completion_request(
    host: str, port: int, prompt: Sequence[int], max_tokens: int, seed: int, **wishes: object
) -> bytes:
    """The bytes of one streamed call; ``wishes`` are further fields of its body."""
    fields = {"prompt": list(prompt), "max_tokens": max_tokens, "seed": seed, "stream": True, **wishes}
    body = json.dumps(fields).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


def _events(parts: Sequence[tuple[float, bytes]]) -> tuple[list[tuple[float, str]], int]:
    """Server-sent events with the time each was complete, and the HTTP status (0 if there was no answer)."""
    head, body, status = b"", b"", 0
    framed, text = b"", ""
    events: list[tuple[float, str]] = []
    for at, data in parts:
        if not status:
            head += data
            if b"\r\n\r\n" not in head:
                continue
            head, _, data = head.partition(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
        framed += data
        body, framed = _unchunk(framed)
        text += body.decode()
        *complete, text = text.split("\n\n")
        events += [(at, event.removeprefix("data: ")) for event in complete]
    if status not in (0, 200):
        events.append((0.0, (text or framed.decode("utf-8", "replace"))[:200]))
    return events, status


def _unchunk(framed: bytes) -> tuple[bytes, bytes]:
    """Remove HTTP's chunk framing: (bytes of complete chunks, what is left)."""
    body = b""
    while True:
        size, line_end, rest = framed.partition(b"\r\n")
        try:
            length = int(size, 16)
        except ValueError:
            return body, framed
        if not line_end or len(rest) < length + 2:
            return body, framed
        body, framed = body + rest[:length], rest[length + 2 :]


def _common(said: str, expected: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(said, expected, strict=False)) if a != b), len(said))
