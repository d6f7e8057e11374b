"""Which memory with names vLLM's processes share, where they listen and where they met, so that tests see
that none of it is left."""

import os
import tempfile
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


def met_in(shared: Iterable[str]) -> set[Path]:
    """The files in which ranks that share this memory have met."""
    idents = {name.split("#")[0] for name in shared if name.startswith(KINDS[0])}
    return {Path(tempfile.gettempdir(), ident[: len(KINDS[0]) + 32]) for ident in idents}


def sockets_of(pids: Iterable[int]) -> set[Path]:
    """Where these processes listen, or did before the name was taken away, at a path of vLLM's kind."""
    inodes: set[str] = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(descriptor))
            except OSError:
                continue
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    named = {Path(row[7]) for row in rows if len(row) == 8 and f"socket:[{row[6]}]" in inodes}
    return {path for path in named if str(path.parent) == tempfile.gettempdir() and path.name.count("-") == 4}
