"""A frontend at run time: the stream table behind a bus, and the token streams that consumers iterate over.

Everything happens in one event loop. Used by the HTTP server and by `llumnix.connect()`, each in its own
process with its own bus address, so tokens go straight from the instances to whoever asked for them.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

from llumnix.api.backend import FailKind, StreamCall, StreamFailed, TokenChunk
from llumnix.api.stream_state import Deliver, Fail
from llumnix.api.streams import StreamTable
from llumnix.core.config import Config
from llumnix.core.effects import Send
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import FrontendHello
from llumnix.runtime.bus import Bus

log = logging.getLogger(__name__)

HELLO_INTERVAL_S = 1.0
TICK_MAX_S = 0.25


class Frontend:
    """Opens streams until `close`. Must be made and used in one event loop. ``on_failure`` is called when it
    cannot go on, since nothing would look at deadlines any more; ``failure`` is why."""

    def __init__(
        self,
        config: Config,
        *,
        frontend_id: str,
        manager_address: str,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.bus = Bus(config.cluster.bind_host, on_message=self._handle, on_lost=self._lost)
        self._manager_address = manager_address
        self._hello = FrontendHello(frontend_id, self.bus.address)
        self.table = StreamTable(frontend_id, self.bus.address, manager_address, config.frontend)
        self._streams: dict[str, BusStream] = {}
        self.failure: BaseException | None = None
        self._on_failure = on_failure
        self._ticker = asyncio.create_task(self._tick(), name="frontend-tick")
        self._ticker.add_done_callback(self._ticker_ended)

    @property
    def address(self) -> str:
        """Where this frontend takes messages."""
        return self.bus.address

    @property
    def ready(self) -> bool:
        """Whether some instance takes requests, as far as is known here."""
        return self.table.ready

    def open(self, call: StreamCall) -> "BusStream":
        """Begin a sequence; see Backend.open. Raises InvariantError, and harms nothing, if one of this id is
        open."""
        effects = self.table.open(call, time.monotonic())
        stream = self._streams[call.request_id] = BusStream(self, call.request_id)
        self._perform(effects)
        return stream

    def cancel(self, request_id: str) -> None:
        """Stop a sequence wherever it is."""
        if self._streams.pop(request_id, None) is not None:
            self._perform(self.table.abort(request_id, time.monotonic()))

    def stop(self) -> None:
        """Stop every sequence that still runs, so that instances free it, and tell its consumer."""
        for request_id, stream in list(self._streams.items()):
            self.cancel(request_id)
            stream.fail(StreamFailed(FailKind.LOST, "the server is being stopped"))

    async def close(self) -> None:
        """Stop what still runs, and leave."""
        self.stop()
        self._ticker.cancel()
        await asyncio.gather(self._ticker, return_exceptions=True)
        self.bus.close()

    def _handle(self, message: object) -> None:
        self._perform(self.table.handle(message, time.monotonic()))

    def _lost(self, address: str) -> None:
        if address != self._manager_address:
            self._perform(self.table.peer_lost(address, time.monotonic()))

    async def _tick(self) -> None:
        hello_at = 0.0
        while True:
            now = time.monotonic()
            if now >= hello_at:
                self.bus.send(self._manager_address, self._hello)
                hello_at = now + HELLO_INTERVAL_S
            self._perform(self.table.tick(now))
            wait_s = min(TICK_MAX_S, self.table.next_deadline() - now)
            await asyncio.sleep(max(0.005, wait_s))

    def _ticker_ended(self, ticker: "asyncio.Task[None]") -> None:
        error = None if ticker.cancelled() else ticker.exception()
        if error is not None:
            self.failure = error
            log.error("the frontend failed", exc_info=error)
            self._on_failure(error)

    def _perform(self, effects: Sequence[object]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.bus.send(effect.address, effect.message)
            elif isinstance(effect, Deliver):
                self._deliver(effect)
            elif isinstance(effect, Fail):
                stream = self._streams.pop(effect.request_id, None)
                if stream is not None:
                    stream.fail(StreamFailed(effect.kind, effect.reason, effect.retry_after_s))
            else:
                raise InvariantError(f"a frontend cannot carry out {effect!r}")

    def _deliver(self, effect: Deliver) -> None:
        stream = self._streams.get(effect.request_id)
        if stream is None:
            return
        stream.push(TokenChunk(effect.first_index, effect.tokens, effect.logprobs, effect.finish_reason))
        if effect.finish_reason is not None:
            del self._streams[effect.request_id]


class BusStream:
    """The TokenStream of one sequence. Chunks the consumer has not taken yet wait here and are handed over as
    one: at most the sequence's own length, however slow the consumer is."""

    def __init__(self, frontend: Frontend, request_id: str) -> None:
        self._frontend = frontend
        self.request_id = request_id
        self._waiting: list[TokenChunk] = []
        self._failure: StreamFailed | None = None
        self._arrived = asyncio.Event()

    def push(self, chunk: TokenChunk) -> None:
        """Add the next tokens; they must follow those pushed before."""
        self._waiting.append(chunk)
        self._arrived.set()

    def fail(self, failure: StreamFailed) -> None:
        """End the stream with an error, after what was pushed before."""
        self._failure = failure
        self._arrived.set()

    async def cancel(self) -> None:
        """See TokenStream."""
        self._frontend.cancel(self.request_id)
        self.fail(StreamFailed(FailKind.INVALID, "the stream was cancelled"))

    async def __aiter__(self) -> AsyncIterator[TokenChunk]:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            chunks, self._waiting = self._waiting, []
            if chunks:
                last = chunks[-1]
                yield last if len(chunks) == 1 else joined(chunks)
                if last.finish_reason is not None:
                    return
            if self._failure is not None:
                raise self._failure


def joined(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """Consecutive chunks of one stream as one."""
    return TokenChunk(
        first_index=chunks[0].first_index,
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        finish_reason=chunks[-1].finish_reason,
    )
