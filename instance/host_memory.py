"""How much memory this process may still take, for whoever sizes something by that. Called once, when an
instance's host pool is made.
"""

import os
from pathlib import Path

CGROUPS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes",
     "total_inactive_file"),
)  # fmt: skip
"""Limit, use, and the part of the use that is only file cache, of the second and the first version."""


def available_bytes(root: Path = Path("/")) -> int:
    """What the kernel would give to new work without swapping, at most what is left of this container's
    limit. Where nothing tells, all of the machine's memory."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = min(available, int(line.split()[1]) * 1024)
    for limit, use, cache in CGROUPS:
        most, used = _text(root / limit).strip(), _text(root / use).strip()
        if most.isdigit() and used.isdigit():
            counts = dict(line.split() for line in _text((root / use).parent / "memory.stat").splitlines())
            available = min(available, int(most) - int(used) + int(counts.get(cache, 0)))
    return max(0, available)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
