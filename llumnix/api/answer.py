"""Drives the streams of one HTTP answer: streamed as server-sent events, or gathered whole.

A client that goes away ends every stream of its answer at once. A slow client only blocks its own writes: the
token streams behind coalesce. Until the first byte is out, a failure is a plain HTTP error; after it, an
event.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llumnix.api.backend import Backend, StreamFailed, TokenStream
from llumnix.api.choices import ChoiceDelta, read_choice
from llumnix.api.errors import ApiError, stream_error
from llumnix.api.intake import Choice
from llumnix.api.metrics import ApiMetrics
from llumnix.api.openai_schema import Generation
from llumnix.api.render import DONE, Collected, Renderer, Usage
from llumnix.api.tokenizer import TextTokenizer

EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class _EventWriter:
    """Server-sent events of one answer; several choices write to it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lock = asyncio.Lock()  # costs nothing where only one choice writes
        self.started = False

    async def write(self, data: bytes, more: bool = True) -> None:
        async with self._lock:
            if not self.started:
                self.started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
            await self._send({"type": "http.response.body", "body": data, "more_body": more})


class Answer(Response):
    """One answer to a completion or chat call. Run by the framework as any response."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: TextTokenizer,
        metrics: ApiMetrics,
        *,
        body: Generation,
        choices: Sequence[Choice],
        renderer: Renderer,
    ) -> None:
        self.background = None
        self._backend = backend
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._body = body
        self._choices = choices
        self._renderer = renderer
        per_prompt = body.n or 1
        self._usage = Usage(sum(len(choice.call.prompt_tokens) for choice in choices[::per_prompt]))
        self._streams: list[TokenStream] = []
        self._failure: ApiError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._stream if self._body.stream else self._gather
        self._streams = [self._backend.open(choice.call) for choice in self._choices]
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_until_gone, receive, group.cancel_scope.cancel)
                await answer(scope, receive, send)
                group.cancel_scope.cancel()
        finally:
            for stream in self._streams:
                await stream.cancel()
            self._metrics.tokens(self._usage.prompt_tokens, self._usage.completion_tokens)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = _EventWriter(send)

        async def show(choice: Choice, delta: ChoiceDelta, first: bool) -> None:
            data = self._renderer.chunk(choice.index, delta)
            if first:
                data = self._renderer.opening(choice.index) + data
            if data:
                await writer.write(data)

        await self._each(show)
        if self._failure is not None and not writer.started:
            await self._failure.response()(scope, receive, send)
            return
        ending = DONE
        if self._failure is not None:
            ending = b"data: " + self._failure.body() + b"\n\n" + DONE
        elif self._body.wants_usage:
            ending = self._renderer.usage(self._usage) + DONE
        await writer.write(ending, more=False)

    async def _gather(self, scope: Scope, receive: Receive, send: Send) -> None:
        gathered = [Collected() for _ in self._choices]

        async def keep(choice: Choice, delta: ChoiceDelta, first: bool) -> None:
            collected = gathered[choice.index]
            collected.texts.append(delta.text)
            collected.finish_reason = delta.finish_reason
            logprobs = self._renderer.logprobs(delta)
            if logprobs is not None:
                collected.logprobs.append(logprobs)

        await self._each(keep)
        if self._failure is not None:
            response = self._failure.response()
        else:
            response = Response(self._renderer.whole(gathered, self._usage), media_type="application/json")
        await response(scope, receive, send)

    async def _each(self, take: Callable[[Choice, ChoiceDelta, bool], Awaitable[None]]) -> None:
        """Read all choices at once, until each is finished or one has failed."""
        if len(self._choices) == 1:
            await self._read(self._choices[0], self._streams[0], take)
            return
        async with anyio.create_task_group() as group:

            async def read(choice: Choice, stream: TokenStream) -> None:
                await self._read(choice, stream, take)
                if self._failure is not None:
                    group.cancel_scope.cancel()

            for choice, stream in zip(self._choices, self._streams, strict=True):
                group.start_soon(read, choice, stream)

    async def _read(
        self,
        choice: Choice,
        stream: TokenStream,
        take: Callable[[Choice, ChoiceDelta, bool], Awaitable[None]],
    ) -> None:
        timer = self._metrics.timer()
        first = True
        try:
            async with aclosing(read_choice(choice, stream, self._body, self._tokenizer)) as deltas:
                async for delta in deltas:
                    self._usage.completion_tokens += delta.count
                    if delta.count:
                        timer.tokens()
                    await take(choice, delta, first)
                    first = False
        except StreamFailed as failure:
            self._failure = self._failure or stream_error(failure)


async def _until_gone(receive: Receive, then: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    then()
