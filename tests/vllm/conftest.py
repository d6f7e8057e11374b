"""Tests with real vLLM engines. They run in vLLM's own environment (`make test-vllm`); elsewhere there is
nothing to collect."""

import sys
from importlib.util import find_spec
from pathlib import Path

for folder in ("e2e", "unit"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
