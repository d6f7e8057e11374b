"""The tokens of simulated requests: a function of (seed, position), made in runs at the speed of a slice.

A fixed circle of PLACES pseudo-random tokens is read from a place that the seed decides, so a token that is
lost, doubled, out of order or of another request shows, and no two of PLACES requests in a row begin alike:
none finds KV of another in host memory. None of them is an end token.
"""

import random
from collections.abc import Iterable, Sequence

from llumnix.instance.executor import Chunk, SampledToken
from llumnix.instance.request import Request
from llumnix.instance.simulated_executor import EOS_TOKEN, LETTERS, VOCAB_SIZE

__all__ = ["EOS_TOKEN", "VOCAB_SIZE", "prompt_tokens", "sample", "sample_chunks", "tokens_of"]

TABLE_SEED = 7
PLACES = 131_071
HASHED_TOKENS = 512
HASHES = 1 << 64
_CIRCLE = random.Random(TABLE_SEED).randbytes(PLACES).translate(LETTERS * (256 // len(LETTERS)))
_TABLE = 2 * _CIRCLE  # so that what is read in one go seldom meets its end
_SAMPLED = tuple(SampledToken(token) for token in range(VOCAB_SIZE))


def tokens_of(seed: int, start: int, count: int) -> bytes:
    """The tokens of a request at positions ``start … start + count - 1`` of prompt + output."""
    place = (seed + start) % PLACES
    end = place + count
    table = _TABLE if end <= len(_TABLE) else _CIRCLE * (end // PLACES + 1)
    return table[place:end]


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
    places = [(request.sampling.seed + len(request.tokens)) % PLACES for request in requests]
    return [_TABLE[place : place + count] for place in places]


def sample_chunks(chunks: tuple[Chunk, ...]) -> list[SampledToken]:
    """What a plan's sampling chunks produce, in its order."""
    return [
        _SAMPLED[_TABLE[(chunk.request.sampling.seed + len(chunk.request.tokens)) % PLACES]]
        for chunk in chunks
        if chunk.samples
    ]
