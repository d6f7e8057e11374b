"""Builds the C kernels once per machine and loads them.

The library lives in the user's cache folder under a name derived from the sources, the compiler and the
processor, so a changed source, another compiler or a home folder shared between machines never loads a wrong
one. It is compiled beside its final place, in a folder of its own, and renamed, so that several threads and
processes may build at once. Without a compiler, or if it fails, there is no library and the caller uses the
torch reference.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = (
    "vector.h",
    "pool.h",
    "attention.h",
    "avx512.h",
    "linear.h",
    "attention.c",
    "attention_amx.c",
    "copy.c",
    "elementwise.c",
    "features.c",
    "linear.c",
    "linear_bf16.c",
    "pool.c",
)
BASE_FLAGS = (
    "-O3",
    "-std=gnu11",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wno-psabi",
    "-shared",
    "-fPIC",
    "-pthread",
)
# Tried in this order: a compiler may not know the processor it runs on.
TARGET_FLAGS = (("-march=native",), ("-mcpu=native",), ())
COMPILE_TIMEOUT_S = 120.0

log = logging.getLogger(__name__)

_POINTER, _INT, _SIZE, _LONG, _FLOAT, _DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_size_t,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
)


SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "llumnix_best_product": ([], _INT),
    "llumnix_copy_runs": ([_POINTER] * 3 + [_LONG] * 2 + [_DOUBLE], _LONG),
    "llumnix_linear": ([_POINTER] * 4 + [_SIZE] * 3 + [_INT] * 4, _INT),
    "llumnix_packed_rows": ([_POINTER] * 3 + [_SIZE] * 2 + [_INT] * 2, None),
    "llumnix_attention": ([_POINTER] * 5 + [_LONG] * 9 + [_FLOAT] + [_INT] * 3, _INT),
    "llumnix_rms_norm": ([_POINTER] * 3 + [_LONG] * 5 + [_FLOAT, _INT, _INT], None),
    "llumnix_rope": ([_POINTER] * 5 + [_LONG] * 6 + [_INT], None),
    "llumnix_write_kv": ([_POINTER] * 5 + [_LONG] * 7 + [_INT] * 2, None),
    "llumnix_gather_blocks": ([_POINTER] * 3 + [_LONG] * 2, None),
    "llumnix_scatter_blocks": ([_POINTER] * 3 + [_LONG] * 2, None),
    "llumnix_copy_bytes": ([_POINTER] * 3 + [_LONG], None),
}


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, built first if need be. None: no compiler, or it failed; the log says why."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        log.warning("no C compiler found: the CPU kernels run in plain torch, several times slower")
        return None
    path = _cache_folder() / f"kernels-{_fingerprint(compiler)}.so"
    if not path.exists() and not _build(compiler, path):
        return None
    library = ctypes.CDLL(str(path))
    for name, (arguments, result) in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llumnix"


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    cpu_info = Path("/proc/cpuinfo")
    features: list[str] = []
    if cpu_info.exists():
        described = ("flags", "Features", "model name", "CPU part")
        features = sorted({line for line in cpu_info.read_text().splitlines() if line.startswith(described)})
    parts = [version, platform.machine().encode(), *(line.encode() for line in features)]
    parts.append(repr((BASE_FLAGS, TARGET_FLAGS)).encode())
    parts.extend((Path(__file__).parent / name).read_bytes() for name in SOURCES)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _build(compiler: str, path: Path) -> bool:
    sources = [str(Path(__file__).parent / name) for name in SOURCES if name.endswith(".c")]
    message = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own: threads share a process id, and so do containers that share a home folder.
        with TemporaryDirectory(prefix="building-", dir=path.parent) as folder:
            partial = Path(folder) / path.name
            for flags in TARGET_FLAGS:
                command = [compiler, *BASE_FLAGS, *flags, *sources, "-o", str(partial)]
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
                )
                if done.returncode == 0:
                    partial.replace(path)
                    return True
                message = done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        message = str(error)
    log.warning(
        "the CPU kernels could not be compiled and run in plain torch, much slower: %s", message[-500:]
    )
    return False
