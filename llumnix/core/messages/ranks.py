"""Messages between a vLLM instance and the processes of its ranks (tensor parallelism), over sockets of one
host: instance/vllm_ranks.py on the instance's side, instance/vllm_rank.py on the other.
"""

from dataclasses import dataclass

from llumnix.core.messages.control import KvLayout


@dataclass(frozen=True, slots=True)
class RankHello:
    """Rank to instance, as soon as its process is up."""

    rank: int


@dataclass(frozen=True, slots=True)
class RankFailed:
    """Rank to instance: it cannot start, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class RankReady:
    """Rank to instance: it has its part of vLLM's KV, ``vllm_blocks`` blocks of ``vllm_block_size`` tokens.
    ``layout`` is that of the pool, with the heads of all ranks; its ``blocks`` mean nothing."""

    vllm_blocks: int
    vllm_block_size: int
    layout: KvLayout


@dataclass(frozen=True, slots=True)
class PoolOffered:
    """Instance to rank: the pool, whose descriptor follows; or, if ``reason`` is not empty, why there is
    none."""

    layout: KvLayout
    reason: str


@dataclass(frozen=True, slots=True)
class CopyOrder:
    """Instance to rank: copy your heads of the KV of tokens ``first … end - 1`` of a request, out of vLLM's
    blocks into those of the pool or the other way. Both lists begin at token 0."""

    number: int
    outward: bool
    vllm_blocks: tuple[int, ...]
    pool_blocks: tuple[int, ...]
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class CopyDone:
    """Rank to instance: that order is carried out, or has failed for ``reason``."""

    number: int
    reason: str
