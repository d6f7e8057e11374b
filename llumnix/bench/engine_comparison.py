"""Plain vLLM on the engine benchmark's workload, in a process and an environment of its own, and how the two
compare. Called by the engine benchmark when it is told where that environment is.
"""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from llumnix.bench import plain_vllm

TIMEOUT_S = 600.0
REASON_LINES = 5


def measure_vllm(python: str, workload: Mapping[str, Any]) -> dict[str, Any]:
    """Run ``plain_vllm`` with the interpreter ``python``. Raises ClickException with the last it said."""
    with tempfile.TemporaryDirectory(prefix="llumnix-bench-") as folder:
        given, result = Path(folder, "workload.json"), Path(folder, "result.json")
        given.write_text(json.dumps(dict(workload)))
        command = [python, "-P", plain_vllm.__file__, str(given), str(result)]  # -P: our folder stays out
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=folder, timeout=TIMEOUT_S, check=False
            )
        except OSError as error:
            raise click.ClickException(f"cannot run {python}: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise click.ClickException(f"vLLM did not finish within {TIMEOUT_S:.0f} s") from error
        if done.returncode != 0 or not result.exists():
            last = done.stderr.strip().splitlines()[-REASON_LINES:]
            raise click.ClickException("vLLM did not run the workload:\n" + "\n".join(last))
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured


def with_ratios(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Their rows, each with ``ratio``: our tokens/s by theirs on the same work."""
    rates = {(row.get("batch"), row["prompt_tokens"]): row["tokens_per_s"] for row in ours}
    return [
        {**row, "ratio": rates[row.get("batch"), row["prompt_tokens"]] / row["tokens_per_s"]}
        for row in theirs
    ]
