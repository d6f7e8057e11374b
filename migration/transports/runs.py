"""Which copies a read consists of. Used by every reader."""

from collections.abc import Sequence
from dataclasses import dataclass

from llumnix.core.errors import TransportError


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` blocks that are consecutive on both sides, from ``source`` and ``target`` on."""

    source: int
    target: int
    count: int


def plan_runs(
    source_blocks: Sequence[int], target_blocks: Sequence[int], *, target_total: int, blocks_max: int
) -> list[Run]:
    """Merge block pairs that ascend together into runs of at most ``blocks_max``, in the order given.
    Raises TransportError unless all ids could be blocks: the target's own are checked here, the source's
    upper bound is known to the source alone."""
    if len(source_blocks) != len(target_blocks):
        raise TransportError(f"{len(source_blocks)} source blocks for {len(target_blocks)} target blocks")
    if source_blocks and (min(source_blocks) < 0 or min(target_blocks) < 0):
        raise TransportError("a block id is negative")
    if target_blocks and max(target_blocks) >= target_total:
        raise TransportError(f"target block {max(target_blocks)} of a pool of {target_total}")
    runs: list[Run] = []
    start, count = 0, 0
    for index in range(len(source_blocks)):
        grows = (
            0 < count < blocks_max
            and source_blocks[index] == source_blocks[start] + count
            and target_blocks[index] == target_blocks[start] + count
        )
        if not grows and count:
            runs.append(Run(source_blocks[start], target_blocks[start], count))
        start, count = (start, count + 1) if grows else (index, 1)
    if count:
        runs.append(Run(source_blocks[start], target_blocks[start], count))
    return runs
