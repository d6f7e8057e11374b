"""One choice while it is generated: from token chunks to text, log probabilities and a finish reason.

Watches for stop strings, which instances know nothing of, and stops the stream there when one is found.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from llumnix.api.backend import FailKind, StreamFailed, TokenStream
from llumnix.api.detokenizer import TextStream
from llumnix.api.intake import Choice
from llumnix.api.openai_schema import Generation
from llumnix.api.tokenizer import TextTokenizer
from llumnix.core.messages.serving import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one chunk adds to a choice. ``tokens`` and ``logprobs`` are those behind the text, held-back text
    aside; ``count`` is how many tokens the client is charged for."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    count: int
    finish_reason: str | None


async def read_choice(
    choice: Choice, stream: TokenStream, body: Generation, tokenizer: TextTokenizer
) -> AsyncGenerator[ChoiceDelta, None]:
    """Deltas of one choice up to the one with its finish reason. Raises StreamFailed."""
    keep_stop = bool(body.include_stop_str_in_output)
    text = TextStream(
        tokenizer.table,
        body.stops,
        keep_stop=keep_stop,
        skip_special=body.skip_special_tokens is not False,
        min_tokens=choice.call.sampling.min_tokens,
    )
    if choice.echo:
        yield ChoiceDelta(choice.echo, (), (), 0, None)
    async for chunk in stream:
        if chunk.finish_reason is FinishReason.ABORT:
            raise StreamFailed(FailKind.LOST, "the request was aborted in the cluster")
        tokens = chunk.tokens
        if chunk.finish_reason is FinishReason.STOP and tokens and not keep_stop:
            tokens = tokens[:-1]  # the token that ended it is no text
        shown = text.push(tokens, last=chunk.finish_reason is not None)
        if shown.stopped:
            await stream.cancel()
            used = shown.tokens_used
            yield ChoiceDelta(shown.text, tokens[:used], chunk.logprobs[:used], used, "stop")
            return
        finish = None if chunk.finish_reason is None else chunk.finish_reason.value
        yield ChoiceDelta(shown.text, tokens, chunk.logprobs[: len(tokens)], len(chunk.tokens), finish)
