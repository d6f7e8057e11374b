"""An instance whose process dies while it starts, as one does whose model is larger than memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
LLUMNIX = str(Path(sys.executable).with_name("llumnix"))
DIES = """
import os, ray

class Dies:
    def __init__(self, config):
        if (ray.get_runtime_context().get_actor_name() or "").startswith("instance:"):
            os._exit(1)

    def select(self, rows, limit):
        return ()
"""


def test_serve_says_that_an_instance_dies_and_ends(tmp_path: Path) -> None:
    """Ray starts its process again, three times a second, for ever, and answers nobody who waits for it."""
    (tmp_path / "dies.py").write_text(DIES)
    done = subprocess.run(
        [
            *(LLUMNIX, "serve", "--engine", "simulated", "--instances", "1", "--port", "0"),
            *("--selection-policy", "dies:Dies"),
        ],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "instance i0 did not start: its process died 3 times before it served" in done.stderr
