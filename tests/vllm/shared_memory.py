"""Which memory with names vLLM's processes share, so that tests see that none of it is left."""

from collections.abc import Iterable
from pathlib import Path


def shared_by(pids: Iterable[int]) -> set[str]:
    """Names in /dev/shm of what these processes have mapped of it: collectives of a CPU, message queues,
    locks."""
    found: set[str] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        names = {line.partition("/dev/shm/")[2] for line in lines}
        found |= {
            name for name in names if name.startswith(("vllm_dist_", "psm_", "sem.mp-")) and " " not in name
        }
    return found
