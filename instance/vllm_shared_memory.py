"""The memory with names that vLLM's processes share, and taking the names away when they end: a process that
is killed leaves its names behind, and Python's cleaner of them is ended by Ray together with the instance.

A name is taken from what a process has mapped, so nobody else's is touched. Whoever has mapped the memory
keeps it until it ends. Used by both sides of the ranks, vllm_ranks.py and vllm_rank.py.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

SHARED: Final = "/dev/shm/"
KINDS: Final = ("psm_", "sem.mp-")
"""How Python names memory (vLLM's message queues) and locks that processes share."""
COLLECTIVES: Final = "vllm_dist_"
"""What ranks on a CPU share has names that begin with this."""


def mapped() -> frozenset[Path]:
    """Message queues and locks that this process has mapped and that still have names."""
    with open("/proc/self/maps") as maps:
        names = {line.rstrip("\n").partition(SHARED)[2] for line in maps}
    return frozenset(Path(SHARED + name) for name in names if name.startswith(KINDS) and " " not in name)


def take_away(names: Iterable[Path]) -> None:
    """Have no process find these any more."""
    for name in names:
        name.unlink(missing_ok=True)


def take_away_of_rank() -> None:
    """All names that this rank knows: its queues, and on a CPU what all ranks of the instance share. Any of
    them does it for those that were killed."""
    ident = os.environ.get("VLLM_DIST_IDENT", "")
    if ident.startswith(COLLECTIVES):
        take_away(Path(SHARED).glob(f"{ident}*"))
    take_away(mapped())
