"""Which machine and which code a benchmark ran on, for its JSON."""

import os
import platform
import subprocess
import time
from pathlib import Path

import torch

PROC = Path("/proc")
OTHERS_MAX = 0.03


def describe_machine() -> dict[str, object]:
    """Plain data. ``load_before`` is the one-minute load average: a busy machine measures itself."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "system": platform.platform(),
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
        "commit": _commit(),
    }


class OthersCpu:
    """How much of the machine's processors others than this process and its children have used since it was
    made: a benchmark that waits for clocks is worth little when that is much. Linux only; elsewhere 0."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._before_s = _cpu_of_others_s()

    def share(self) -> float:
        """Of all processors together."""
        elapsed_s = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return round(max(0.0, _cpu_of_others_s() - self._before_s) / elapsed_s, 4)


def warn_of_others(share: float) -> None:
    """Say so if others had too much of the machine for a benchmark to be believed."""
    if share > OTHERS_MAX:
        print(f"others used {share:.1%} of this machine's processors meanwhile: repeat it on a quiet one")


def _cpu_of_others_s() -> float:
    try:
        busy = sum(map(int, PROC.joinpath("stat").read_text().split("\n", 1)[0].split()[1:4]))
    except OSError:
        return 0.0
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        parents[int(stat.parent.name)] = int(fields[1])
        ticks[int(stat.parent.name)] = sum(map(int, fields[11:15]))  # its own, and of children that ended
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return (busy - sum(ticks.get(pid, 0) for pid in ours)) / os.sysconf("SC_CLK_TCK")


def _commit() -> str:
    """The checkout's commit, or nothing where this is no checkout."""
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return shown.stdout.strip()
