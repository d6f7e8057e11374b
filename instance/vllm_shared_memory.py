"""The memory with names that vLLM's processes share, and taking the names away: a process that is killed
leaves its names behind, and Python's cleaner of them is ended by Ray together with the instance.

A name is found by what a process has mapped, so nobody else's is touched. Whoever has mapped the memory keeps
it until it ends. Used by both sides of the ranks: by the instance once all have started (vllm_ranks.py), and
by ranks that end before (vllm_rank.py).
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

SHARED: Final = "/dev/shm/"
COLLECTIVES: Final = "vllm_dist_"
KINDS: Final = ("psm_", "sem.mp-", COLLECTIVES)
"""How what they share is called: Python's memory (vLLM's message queues) and locks, and on a CPU what ranks
compute sums in."""


def mapped(pid: int) -> frozenset[Path]:
    """What of this kind a process has mapped and still has names; nothing if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return frozenset()
    # By inode: who makes a semaphore has it mapped under a name of before.
    inodes = {int(line.split()[4]) for line in lines if SHARED in line}
    with os.scandir(SHARED) as files:
        return frozenset(
            Path(file.path) for file in files if file.name.startswith(KINDS) and file.inode() in inodes
        )


def take_away(names: Iterable[Path]) -> None:
    """Have no process find these any more."""
    for name in names:
        name.unlink(missing_ok=True)


def take_away_of_rank() -> None:
    """What this rank has mapped, and on a CPU what the others of its instance have just made."""
    ident = os.environ.get("VLLM_DIST_IDENT", "")
    if ident.startswith(COLLECTIVES):
        take_away(Path(SHARED).glob(f"{ident}*"))
    take_away(mapped(os.getpid()))
