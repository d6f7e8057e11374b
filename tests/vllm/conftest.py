"""Tests with real vLLM engines. They run in vLLM's own environment (`make test-vllm`); elsewhere there is
nothing to collect. Instances in processes of their own are forked from one that has imported vLLM, which
alone takes longer than most of what they do."""

import multiprocessing
import sys
from importlib.util import find_spec
from pathlib import Path

for folder in ("e2e", "unit"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        [
            "llumnix.instance.vllm_engine",
            "llumnix.runtime.instance_factory",
            "vllm.v1.engine.llm_engine",
            "vllm.v1.worker.cpu_worker",
            "vllm.model_executor.models.llama",
        ]
    )
