"""Which memory with names vLLM's processes share, so that tests see that none of it is left."""

import os
from collections.abc import Iterable
from pathlib import Path

KINDS = ("vllm_dist_", "psm_", "sem.mp-")


def shared_by(pids: Iterable[int]) -> set[str]:
    """Names in /dev/shm of what these processes have mapped of it, or names it had: collectives of a CPU,
    message queues, locks."""
    found: set[str] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        names = {line.partition("/dev/shm/")[2].removesuffix(" (deleted)") for line in lines}
        found |= {name for name in names if name.startswith(KINDS)}
        inodes = {int(line.split()[4]) for line in lines if "/dev/shm/" in line}
        with os.scandir("/dev/shm") as files:
            found |= {file.name for file in files if file.name.startswith(KINDS) and file.inode() in inodes}
    return found
