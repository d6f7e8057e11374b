"""The engine benchmark's workload in plain vLLM, to stand beside our figures: ``llumnix bench engine
--against-vllm PYTHON`` runs this file with another environment's interpreter.

It imports nothing of ours, since that environment need not have us. vLLM runs in this process with its own
defaults; only the model's length, the prefix cache (off: nothing repeats) and the threads are set. Steps are
counted as in the engine benchmark: a full batch that has prefilled, after some steps of warming up.

Called as ``python plain_vllm.py WORKLOAD RESULT``, two JSON files; see ``engine_comparison``.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def main(workload_path: str, result_path: str) -> None:
    workload = json.loads(Path(workload_path).read_text())
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE=str(workload["kv_gib"]),
        VLLM_CPU_OMP_THREADS_BIND=f"0-{workload['threads'] - 1}",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
    )
    import numpy as np
    import vllm
    from vllm import EngineArgs, LLMEngine

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=workload["model"],
            dtype=workload["dtype"],
            max_model_len=workload["max_model_len"],
            enable_prefix_caching=False,
            distributed_executor_backend="uni",
        )
    )
    bench = PlainBench(engine, workload, np.random.default_rng(workload["seed"]))
    result = {
        "version": vllm.__version__,
        "results": [bench.decode(batch, prompt) for batch, prompt in workload["decodes"]],
        "prefill": [bench.prefill(tokens) for tokens in workload["prefills"]],
    }
    Path(result_path).write_text(json.dumps(result))


class PlainBench:
    """An engine with the requests to drive it."""

    def __init__(self, engine: Any, workload: dict[str, Any], rng: Any) -> None:
        self._engine = engine
        self._workload = workload
        self._rng = rng
        self._submitted = 0

    def decode(self, batch: int, prompt_tokens: int) -> dict[str, float]:
        steps, warmup = self._workload["steps"], self._workload["warmup_steps"]
        names = {self._submit(prompt_tokens, steps + 2 * warmup + batch) for _ in range(batch)}
        waiting = set(names)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}
        self._times(warmup)
        times = self._times(steps)
        self._engine.abort_request(list(names))
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return {
            "batch": batch,
            "prompt_tokens": prompt_tokens,
            "tokens_per_s": batch * steps / sum(times),
            "step_ms_p50": statistics.median(times) * 1e3,
        }

    def prefill(self, tokens: int) -> dict[str, float]:
        times = []
        for _ in range(self._workload["prefill_repeats"] + 1):
            self._submit(tokens, 1)
            begin = time.perf_counter()
            while self._engine.has_unfinished_requests():
                self._engine.step()
            times.append(time.perf_counter() - begin)
        middle = statistics.median(times[1:])
        return {"prompt_tokens": tokens, "tokens_per_s": tokens / middle, "ms_p50": middle * 1e3}

    def _submit(self, prompt_tokens: int, max_tokens: int) -> str:
        from vllm import SamplingParams

        self._submitted += 1
        name = f"bench-{self._submitted}"
        prompt = {
            "prompt_token_ids": self._rng.integers(0, self._workload["vocab_size"], prompt_tokens).tolist()
        }
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        self._engine.add_request(name, prompt, sampling)
        return name

    def _times(self, count: int) -> list[float]:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            self._engine.step()
            times.append(time.perf_counter() - begin)
        return times


if __name__ == "__main__":
    main(*sys.argv[1:])
