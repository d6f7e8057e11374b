"""The tokens of simulated requests: a function of (seed, position), made in runs at the speed of a slice.

A fixed table of pseudo-random tokens is read from a place that the seed decides, so a token that is lost,
doubled, out of order or of another request shows. None of them is an end token.
"""

from collections.abc import Iterable, Sequence

from llumnix.instance.executor import Chunk, SampledToken
from llumnix.instance.request import Request
from llumnix.instance.simulated_executor import EOS_TOKEN, VOCAB_SIZE, simulated_token

__all__ = ["EOS_TOKEN", "VOCAB_SIZE", "prompt_tokens", "sample", "sample_chunks", "tokens_of"]

TABLE_SEED = 7
PLACES = 4093
LENGTH_MAX = 1 << 15
HASHED_TOKENS = 512
HASHES = 1 << 64
_TABLE = bytes(simulated_token(TABLE_SEED, position) for position in range(PLACES + LENGTH_MAX))
_SAMPLED = tuple(SampledToken(token) for token in range(VOCAB_SIZE))


def tokens_of(seed: int, start: int, count: int) -> bytes:
    """The tokens of a request at positions ``start … start + count - 1`` of prompt + output."""
    place = seed % PLACES + start
    return _TABLE[place : place + count]


def prompt_tokens(seed: int, length: int, hashes: Sequence[int] = ()) -> tuple[int, ...]:
    """A prompt: the request's first tokens, but for leading parts that have a hash, which are its own."""
    hashed = b"".join(_hashed(one) for one in hashes)[:length]
    return tuple(hashed + tokens_of(seed, len(hashed), length - len(hashed)))


def _hashed(value: int) -> bytes:
    """HASHED_TOKENS tokens, others for every value."""
    named = (value % HASHES).to_bytes(8, "big")
    return named + tokens_of(value, 0, HASHED_TOKENS - len(named))


def sample(requests: Iterable[Request], count: int) -> list[bytes]:
    """The next ``count`` tokens of each request; for EngineCore.advance."""
    places = [request.sampling.seed % PLACES + len(request.tokens) for request in requests]
    return [_TABLE[place : place + count] for place in places]


def sample_chunks(chunks: tuple[Chunk, ...]) -> list[SampledToken]:
    """What a plan's sampling chunks produce, in its order."""
    return [
        _SAMPLED[_TABLE[chunk.request.sampling.seed % PLACES + len(chunk.request.tokens)]]
        for chunk in chunks
        if chunk.samples
    ]
