"""Which machine and which code a benchmark ran on, for its JSON."""

import os
import platform
import subprocess
from pathlib import Path

import torch


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
