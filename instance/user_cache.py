"""Folders in the user's cache that are made once and then used by every process.

A finished folder appears by one rename, and a lock lets a second process wait for the first instead of doing
the work again, so a folder that exists is whole, whatever was killed when. Called by whoever needs files that
take long to make (smollm2.py), or that must outlive the process that makes them (vllm_lora.py).
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cached_folder(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` of this kind; ``make`` writes its files first, into an empty one, if the cache
    lacks it. What that raises is raised here, and leaves nothing behind."""
    folder = _cache() / kind / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _make(folder, make)
    return folder


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llumnix"


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    # Left behind by processes that were killed while they held the lock, which is ours now.
    for stale in folder.parent.glob(f".{folder.name}.part-*"):
        shutil.rmtree(stale, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-", dir=folder.parent))
    try:
        make(part)
        part.chmod(0o755)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
