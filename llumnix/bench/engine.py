"""``llumnix bench engine``: how fast one engine decodes and prefills, and where the time of a step goes.

Runs the engine core and the torch executor in this process: no Ray, no network, no frontend. Decode rates
count steps of a full batch only, after every request has prefilled. The parts of a step are measured in
further steps with a clock around each kernel, so those clocks do not touch the rates. Needs a quiet machine
to mean anything; the load is noted in the result. On request plain vLLM does the same work right afterwards,
and the two are set side by side (``engine_comparison``).
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from llumnix.bench import vllm_layer
from llumnix.bench.engine_comparison import measure_vllm, with_ratios
from llumnix.bench.machine import describe_machine
from llumnix.cli.output_paths import OUTPUT_FILE
from llumnix.core.config import EngineConfig
from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.errors import LlumnixError
from llumnix.core.messages.serving import RequestSpec
from llumnix.core.sampling import SamplingParams
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.model_loader import resolve_model
from llumnix.instance.request import Request
from llumnix.instance.sampler import Sampler
from llumnix.instance.torch_executor import TorchExecutor
from llumnix.kernels import ops
from llumnix.kernels.interface import Kernels

BATCHES = (1, 8, 32)
PROMPTS = (16, 256)
PREFILLS = (128, 512, 2048)
WARMUP_STEPS = 5
PREFILL_REPEATS = 3
PARTS = {
    "attention": ("decode_attention", "prefill_attention"),
    "linear": ("linear", "linear_add", "linear_silu_mul"),
    "norm, rope, KV write": ("rms_norm", "rope", "write_kv", "embedding"),
}


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """Steps of a full batch. ``context_tokens`` is the mean length attended over; times in milliseconds."""

    batch: int
    prompt_tokens: int
    context_tokens: float
    steps: int
    tokens_per_s: float
    step_ms_p50: float
    step_ms_p99: float
    parts_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """One prompt, alone, from submission to its first token."""

    prompt_tokens: int
    tokens_per_s: float
    ms_p50: float


def run(config: EngineConfig, steps: int, seed: int, vllm_python: str | None = None) -> dict[str, Any]:
    """Measure one engine, and plain vLLM in the environment of ``vllm_python``. Returns what goes into the
    JSON file; ``results`` holds the decode rates."""
    executor = TorchExecutor(config, pool_name="llumnix-bench-engine")
    try:
        load_before = os.getloadavg()[0]
        bench = _Bench(executor, config, np.random.default_rng(seed))
        results = [bench.decode(batch, prompt, steps) for prompt in PROMPTS for batch in BATCHES]
        prefills = [bench.prefill(tokens) for tokens in PREFILLS if tokens < bench.engine.max_model_len]
    finally:
        executor.close()
    report: dict[str, Any] = {
        "benchmark": "engine",
        "config": asdict(config),
        "seed": seed,
        "dtype": executor.kv_layout.dtype,
        "machine": {
            **describe_machine(),
            "load_before": load_before,
            "threads": torch.get_num_threads(),
            "kernels": type(ops.kernels_for("cpu")).__name__,
        },
        "results": [asdict(result) for result in results],
        "prefill": [asdict(result) for result in prefills],
        "peak_memory_bytes": _peak_memory_bytes(),
    }
    if vllm_python is not None:
        theirs = measure_vllm(vllm_python, _workload(bench, config, steps, seed))
        for rows in ("results", "prefill"):
            theirs[rows] = with_ratios(report[rows], theirs[rows])
        report["vllm"] = theirs
    return report


def _workload(bench: "_Bench", config: EngineConfig, steps: int, seed: int) -> dict[str, Any]:
    """The same work for vLLM; see ``plain_vllm``."""
    executor = bench.engine.executor
    prefills = [tokens for tokens in PREFILLS if tokens < bench.engine.max_model_len]
    return {
        "model": str(resolve_model(config.model)),
        "dtype": executor.kv_layout.dtype,
        "max_model_len": bench.engine.max_model_len,
        "kv_gib": max(1, round(config.kv_gib)),
        "vocab_size": executor.vocab_size,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "steps": steps,
        "warmup_steps": WARMUP_STEPS,
        "decodes": [(batch, prompt) for prompt in PROMPTS for batch in BATCHES],
        "prefills": prefills,
        "prefill_repeats": PREFILL_REPEATS,
    }


class _Bench:
    """An engine with the requests to drive it."""

    def __init__(self, executor: TorchExecutor, config: EngineConfig, rng: np.random.Generator) -> None:
        self.engine = InProcessEngine(executor, config)
        self._device = executor.pool.tensor.device
        self._step_tokens_max = config.step_tokens_max
        self._rng = rng
        self._submitted = 0

    def decode(self, batch: int, prompt_tokens: int, steps: int) -> DecodeResult:
        # The first to prefill decode until the last has, and are to last until the end all the same.
        prefill_steps = -(-batch * prompt_tokens // max(1, self._step_tokens_max - batch + 1))
        max_tokens = prefill_steps + WARMUP_STEPS + 2 * steps + 2
        specs = [self._spec(prompt_tokens, max_tokens) for _ in range(batch)]
        self._start(specs)
        self._steps(WARMUP_STEPS)
        times = self._steps(steps)
        parts = self._parts(specs, steps)
        for spec in specs:
            self.engine.abort(spec.request_id, spec.epoch)
        return DecodeResult(
            batch=batch,
            prompt_tokens=prompt_tokens,
            context_tokens=prompt_tokens + WARMUP_STEPS + 1 + (steps + 1) / 2,
            steps=steps,
            tokens_per_s=batch * steps / sum(times),
            step_ms_p50=float(np.percentile(times, 50)) * 1e3,
            step_ms_p99=float(np.percentile(times, 99)) * 1e3,
            parts_ms=parts,
        )

    def prefill(self, tokens: int) -> PrefillResult:
        times = []
        for _ in range(PREFILL_REPEATS + 1):
            spec = self._spec(tokens, 1)
            self._submit(spec)
            begin = time.perf_counter()
            while self.engine.has_work():
                self.engine.step(time.perf_counter)
            times.append(time.perf_counter() - begin)
        middle = statistics.median(times[1:])
        return PrefillResult(tokens, tokens / middle, middle * 1e3)

    def _spec(self, prompt_tokens: int, max_tokens: int) -> RequestSpec:
        self._submitted += 1
        vocabulary = self.engine.executor.vocab_size
        return RequestSpec(
            request_id=f"bench-{self._submitted}",
            epoch=FIRST_EPOCH,
            frontend_address="",
            prompt_tokens=tuple(self._rng.integers(0, vocabulary, prompt_tokens).tolist()),
            output_tokens=(),
            sampling=SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True),
        )

    def _submit(self, spec: RequestSpec) -> None:
        refusal = self.engine.submit(spec, time.perf_counter())
        if refusal is not None:
            raise click.ClickException(f"the engine refused a benchmark request: {refusal.reason}")

    def _start(self, specs: Sequence[RequestSpec]) -> None:
        """Submit, and step until every request has its first token."""
        for spec in specs:
            self._submit(spec)
        waiting = {spec.request_id for spec in specs}
        while waiting:
            result = self.engine.step(time.perf_counter)
            waiting -= {delta.request_id for deltas in result.deltas.values() for delta in deltas}

    def _steps(self, count: int) -> list[float]:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            self.engine.step(time.perf_counter)
            times.append(time.perf_counter() - begin)
        return times

    def _parts(self, specs: Sequence[RequestSpec], steps: int) -> dict[str, float]:
        """Mean milliseconds of a step by what they went into; the rest is the engine core, the batch's tables
        and the interpreter."""
        timed = _TimedKernels(ops.kernels_for(self._device.type), self._device)
        with ops.substituted(self._device.type, cast(Kernels, timed)):
            total = sum(self._steps(steps)) / steps
        parts = {
            part: sum(timed.seconds.get(name, 0.0) for name in names) / steps for part, names in PARTS.items()
        }
        parts["sampling"] = _sampling_s(specs, self.engine.executor.vocab_size, self._device)
        parts["rest"] = max(0.0, total - sum(parts.values()))
        return {part: seconds * 1e3 for part, seconds in parts.items()}


class _TimedKernels:
    """A Kernels implementation with a clock around every call."""

    def __init__(self, inner: object, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = inner
        self._synchronize = torch.cuda.synchronize if device.type == "cuda" else None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._inner, name)

        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments)
            if self._synchronize is not None:
                self._synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            return result

        return timed


def _sampling_s(specs: Sequence[RequestSpec], vocabulary: int, device: torch.device) -> float:
    sampler = Sampler(frozenset())
    requests = [Request.from_spec(spec, 0.0) for spec in specs]
    times = []
    for _ in range(WARMUP_STEPS):
        logits = torch.randn(len(specs), vocabulary, device=device)
        begin = time.perf_counter()
        sampler.sample(logits, requests)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _peak_memory_bytes() -> int:
    """The most this process has held: on a GPU there, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _show(report: dict[str, Any]) -> None:
    console = Console()
    machine = report["machine"]
    decode = Table(
        title=f"decode, {report['config']['model']} in {report['dtype']}, {machine['threads']} threads"
    )
    for column in ("batch", "prompt", "tokens/s", "step p50", "p99 ms", *PARTS, "sampling", "rest"):
        decode.add_column(column, justify="right")
    for row in report["results"]:
        parts = (f"{row['parts_ms'][part]:.2f}" for part in (*PARTS, "sampling", "rest"))
        numbers = (f"{row[name]:.1f}" for name in ("tokens_per_s", "step_ms_p50", "step_ms_p99"))
        decode.add_row(str(row["batch"]), str(row["prompt_tokens"]), *numbers, *parts)
    console.print(decode)
    for row in report["prefill"]:
        console.print(f"prefill of {row['prompt_tokens']}: {row['tokens_per_s']:.0f} tokens/s")
    for row in report.get("vllm", {}).get("results", ()):
        shape = f"batch {row['batch']} after prompts of {row['prompt_tokens']}"
        console.print(f"vLLM {shape}: {row['tokens_per_s']:.1f} tokens/s, ours {row['ratio']:.2f} times that")
    for row in report.get("vllm", {}).get("prefill", ()):
        shape = f"prefill of {row['prompt_tokens']}"
        console.print(f"vLLM {shape}: {row['tokens_per_s']:.0f} tokens/s, ours {row['ratio']:.2f} times that")
    console.print(f"peak memory {report['peak_memory_bytes'] / 2**20:.0f} MiB")


@click.command(name="engine")
@click.option("--json", "json_path", type=OUTPUT_FILE, help="write the results to this file")
@click.option("--engine", "kind", type=click.Choice(["torch", "vllm"]), default="torch", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=6, show_default=True, help="with --engine vllm")
@click.option("--model", default="smollm2", show_default=True, help="a folder, a hub id, or smollm2")
@click.option("--dtype", default="bfloat16", show_default=True, help="format of weights and KV")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda")
@click.option(
    "--threads", type=click.IntRange(min=0), default=0, help="compute threads; 0 takes torch's own choice"
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="decode steps measured per batch",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of the random prompts"
)
@click.option(
    "--against-vllm", metavar="PYTHON", help="the interpreter of an environment with vLLM, to compare with"
)
def command(
    json_path: Path | None,
    kind: str,
    repeats: int,
    model: str,
    dtype: str,
    device: str,
    threads: int,
    steps: int,
    seed: int,
    against_vllm: str | None,
) -> None:
    """Tokens per second and decode step times of one engine, without a cluster; with --engine vllm, those of
    an instance over vLLM and of plain vLLM, in turns."""
    try:
        if kind == "vllm":
            layered = vllm_layer.benchmark_config(model, dtype, threads)
            report = vllm_layer.measure(layered, steps=steps, repeats=repeats, seed=seed)
            vllm_layer.show(report)
            _write(json_path, report)
            return
        config = EngineConfig(model=model, dtype=dtype, device=device, threads=threads)
        report = run(config, steps, seed, against_vllm)
    except LlumnixError as error:
        raise click.ClickException(str(error)) from error
    _show(report)
    _write(json_path, report)


def _write(json_path: Path | None, report: dict[str, Any]) -> None:
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
