"""Which KV heads of a model each rank of a tensor-parallel vLLM has. Pure arithmetic, after vLLM's
QKVParallelLinear: heads are dealt out in order; where there are more ranks than heads, each head is on
several ranks next to each other. Used by the connector, by both sides of vllm_ranks.py, and by frontends.
"""

from dataclasses import dataclass

from llumnix.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class HeadsOfRank:
    """Heads ``first … first + count - 1``. ``copies_out``: of the ranks that have the same heads, this is the
    one that copies them into the pool."""

    first: int
    count: int
    copies_out: bool


def heads_of_rank(rank: int, ranks: int, kv_heads: int) -> HeadsOfRank:
    """Of a model with ``kv_heads``. Raises ConfigurationError if they cannot be dealt out."""
    if ranks <= kv_heads and kv_heads % ranks == 0:
        count = kv_heads // ranks
        return HeadsOfRank(rank * count, count, True)
    if ranks % kv_heads:
        raise ConfigurationError(
            f"tensor_parallel {ranks} neither divides the model's {kv_heads} KV heads nor is a multiple"
        )
    copies = ranks // kv_heads
    return HeadsOfRank(rank // copies, 1, rank % copies == 0)


def check_heads(ranks: int, heads: int, kv_heads: int) -> None:
    """Raises ConfigurationError if a model with so many query and KV heads does not run on ``ranks``."""
    if heads % ranks:
        raise ConfigurationError(
            f"tensor_parallel {ranks} does not divide the model's {heads} attention heads"
        )
    heads_of_rank(0, ranks, kv_heads)
