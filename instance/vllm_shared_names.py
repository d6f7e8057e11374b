"""The names by which vLLM's processes find what they share, memory, sockets and the file in which ranks meet,
and taking the names away: a process that is killed leaves its names behind, Python's cleaner of them is ended
by Ray together with the instance, and of its sockets vLLM takes none away.

A name is found by what a process has mapped or listens at, or by what vLLM told it, so nobody else's is
touched. Whoever has mapped the memory, or is connected, keeps it until it ends. Used by both sides of the
ranks: by the instance once all have started (vllm_ranks.py), and by ranks when they end (vllm_rank.py).
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

SHARED: Final = "/dev/shm/"
SOCKETS: Final = "/proc/net/unix"
COLLECTIVES: Final = "vllm_dist_"
KINDS: Final = ("psm_", "sem.mp-", COLLECTIVES)
"""How memory that they share is called: Python's (vLLM's message queues) and locks, and on a CPU what ranks
compute sums in. The file in which ranks meet, elsewhere, is called like the latter."""
SOCKET: Final = re.compile(r"/(.*/)?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""How vLLM's sockets are called."""
FILE: Final = "file://"


def names_of(pid: int) -> frozenset[Path]:
    """What of this kind a process has mapped and still has names, and where it listens; nothing if it has
    ended."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        mine = frozenset(_sockets_of(pid))
    except (FileNotFoundError, ProcessLookupError):
        return frozenset()
    # By inode: who makes a semaphore has it mapped under a name of before.
    inodes = {int(line.split()[4]) for line in lines if SHARED in line}
    with os.scandir(SHARED) as files:
        memory = [file.path for file in files if file.name.startswith(KINDS) and file.inode() in inodes]
    sockets = (line.split(maxsplit=7)[6:] for line in Path(SOCKETS).read_text().splitlines()[1:])
    named = [where[0] for inode, *where in sockets if where and inode in mine and SOCKET.fullmatch(where[0])]
    return frozenset(map(Path, (*memory, *named)))


def meeting_file(init_method: str) -> Path | None:
    """In which ranks that vLLM tells this meet when they start; None: they meet elsewhere."""
    file = Path(init_method.removeprefix(FILE))
    return file if init_method.startswith(FILE) and file.name.startswith(COLLECTIVES) else None


def take_away(names: Iterable[Path]) -> None:
    """Have no process find these any more."""
    for name in names:
        name.unlink(missing_ok=True)


def take_away_of_rank(met_in: Path | None) -> None:
    """What this rank has mapped and where it listens, and with the file that the ranks of its instance met in
    what, on a CPU, the others have just made."""
    if met_in is not None:
        take_away((met_in, *Path(SHARED).glob(f"{met_in.name}*")))
    take_away(names_of(os.getpid()))


def _sockets_of(pid: int) -> Iterator[str]:
    """Their inodes."""
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            kind, _, inode = os.readlink(f"/proc/{pid}/fd/{descriptor}").partition(":")
            if kind == "socket":
                yield inode.strip("[]")
