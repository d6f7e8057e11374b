"""What our layer costs vLLM: the same requests by an instance over vLLM, as it is served, and by plain vLLM.

Two processes with the same settings, one step loop each: an instance with its engine thread, agent, bus and
connector, whose tokens this process hears as a frontend would; and vLLM's own LLMEngine, called directly,
with vLLM's defaults where an instance has its own. They take turns, so that slow changes of the machine
meet both. Rates are those of a full batch that has prefilled. Called by ``llumnix bench engine``.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llumnix.bench.machine import OthersCpu, describe_machine, warn_of_others
from llumnix.bench.migration_driver import Ear
from llumnix.bench.migration_processes import InstanceProcess, Listener
from llumnix.bench.plain_vllm import PlainBench
from llumnix.core.config import Config, EngineConfig
from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.errors import TransportError
from llumnix.core.messages.serving import Abort, RequestSpec, Submit
from llumnix.core.sampling import SamplingParams
from llumnix.instance.model_loader import resolve_model
from llumnix.instance.vllm_launch import start_plain_vllm
from llumnix.instance.vllm_model import read_facts

BATCHES = (1, 8, 32)
PROMPT_TOKENS = 64
WARMUP_STEPS = 5
START_TIMEOUT_S = 240.0
MEASURE_TIMEOUT_S = 240.0
REST_S = 0.2


def benchmark_config(model: str, dtype: str, threads: int) -> EngineConfig:
    """``threads`` of each engine, 0: all cores but one, which is left to the rest of the instance and to this
    process."""
    return EngineConfig(
        kind="vllm",
        model=model,
        dtype=dtype,
        threads=threads or max(1, (os.cpu_count() or 1) - 1),
        max_model_len=2048,
        engine_args="enable_prefix_caching=false",  # nothing repeats
    )


def measure(config: EngineConfig, *, steps: int, repeats: int, seed: int) -> dict[str, Any]:
    """All of it. Returns what goes into the JSON file."""
    machine = describe_machine()
    vocabulary = read_facts(resolve_model(config.model)).vocab_size
    plain = _Plain(config, vocabulary, steps, seed)
    try:
        layered = _Layered(config, vocabulary, seed)
    except TransportError:
        plain.close()
        raise
    try:
        others = OthersCpu()
        for batch in BATCHES:  # once unmeasured: vLLM compiles and allocates with the first of each shape
            layered.tokens_per_s(batch, WARMUP_STEPS)
            plain.tokens_per_s(batch)
        rows = [_row(batch, steps, repeats, layered, plain) for batch in BATCHES]
    finally:
        plain.close()
        layered.close()
    return {
        "benchmark": "engine",
        "engine": "vllm",
        "config": asdict(config),
        "seed": seed,
        "machine": machine,
        "others_cpu_share": others.share(),
        "results": rows,
    }


def show(report: dict[str, Any]) -> None:
    """Print a report of ``run``."""
    table = Table(title=f"vLLM with and without our layer, {report['config']['model']}; tokens/s")
    for name in ("batch", "with", "without", "ratio"):
        table.add_column(name, justify="right")
    for row in report["results"]:
        numbers = (f"{row['tokens_per_s']:.1f}", f"{row['plain_tokens_per_s']:.1f}", f"{row['ratio']:.3f}")
        table.add_row(str(row["batch"]), *numbers)
    Console().print(table)
    warn_of_others(report["others_cpu_share"])


def _row(batch: int, steps: int, repeats: int, layered: "_Layered", plain: "_Plain") -> dict[str, Any]:
    with_us, without = [], []
    for number in range(repeats):
        turns: list[Callable[[], None]] = [
            lambda: with_us.append(layered.tokens_per_s(batch, steps)),
            lambda: without.append(plain.tokens_per_s(batch)),
        ]
        for turn in turns[:: -1 if number % 2 else 1]:
            turn()
    ratios = [ours / theirs for ours, theirs in zip(with_us, without, strict=True)]
    return {
        "batch": batch,
        "prompt_tokens": PROMPT_TOKENS,
        "steps": steps,
        "tokens_per_s": statistics.median(with_us),
        "plain_tokens_per_s": statistics.median(without),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


class _Layered:
    """An instance over vLLM in a process of its own."""

    def __init__(self, config: EngineConfig, vocabulary: int, seed: int) -> None:
        self._ear = Ear()
        self._listener = Listener(Config(), self._ear.heard)
        self._instance = InstanceProcess(Config(engine=config), "a", seed, self._listener.address)
        try:
            self._address = self._instance.hello().address
        except TransportError:
            self.close()
            raise
        self._rng = np.random.default_rng(seed)
        self._vocabulary = vocabulary
        self._count = 0

    def tokens_per_s(self, batch: int, steps: int) -> float:
        specs = [self._spec(2 * (steps + WARMUP_STEPS) + batch) for _ in range(batch)]
        for spec in specs:
            self._listener.send(self._address, Submit(spec))
        for spec in specs:
            self._ear.wait_tokens(spec.request_id, 1)
        last = max((spec.request_id for spec in specs), key=lambda name: self._ear.tokens[name][0].at)
        self._ear.wait_tokens(last, 1 + WARMUP_STEPS + steps)
        said = [heard.at for heard in self._ear.tokens[last][WARMUP_STEPS : WARMUP_STEPS + steps + 1]]
        for spec in specs:
            self._listener.send(self._address, Abort(spec.request_id, FIRST_EPOCH))
        time.sleep(REST_S)  # the step under way ends
        return batch * steps / (said[-1] - said[0])

    def close(self) -> None:
        self._instance.stop()
        self._listener.close()

    def _spec(self, max_tokens: int) -> RequestSpec:
        self._count += 1
        return RequestSpec(
            request_id=f"bench-{self._count}",
            epoch=FIRST_EPOCH,
            frontend_address=self._listener.address,
            prompt_tokens=tuple(self._rng.integers(0, self._vocabulary, PROMPT_TOKENS).tolist()),
            output_tokens=(),
            sampling=SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True),
        )


class _Plain:
    """Plain vLLM in a process of its own."""

    def __init__(self, config: EngineConfig, vocabulary: int, steps: int, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        workload = {"seed": seed, "steps": steps, "warmup_steps": WARMUP_STEPS, "vocab_size": vocabulary}
        self._process = context.Process(target=_serve_plain, args=(theirs, config, workload))
        self._process.start()
        theirs.close()  # so that its end is heard
        try:
            self._hear(START_TIMEOUT_S)
        except TransportError:
            self.close()
            raise

    def tokens_per_s(self, batch: int) -> float:
        self._pipe.send(batch)
        return self._hear(MEASURE_TIMEOUT_S)

    def _hear(self, timeout_s: float) -> float:
        if not self._pipe.poll(timeout_s):
            raise TransportError(f"plain vLLM said nothing for {timeout_s:g} s")
        try:
            return float(self._pipe.recv())
        except (EOFError, OSError):
            raise TransportError("plain vLLM has ended") from None

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve_plain(pipe: Connection, config: EngineConfig, workload: dict[str, Any]) -> None:
    """What plain vLLM's process runs."""
    bench = PlainBench(start_plain_vllm(config), workload, np.random.default_rng(workload["seed"]))
    pipe.send(os.getpid())
    while True:
        pipe.send(bench.decode(pipe.recv(), PROMPT_TOKENS)["tokens_per_s"])
