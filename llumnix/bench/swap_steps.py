"""What a running batch's steps lose to a swap beside them, for `bench swap`.

An engine decodes; meanwhile a thread like the copier's moves the KV of one request after the other, so many
bytes a second in every row, copy by copy or in batches. On a CPU both use the same memory and caches, so
how bytes are moved shows in the steps; on a GPU it should not.
"""

import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch

from llumnix.bench.fairness_runs import CPU_ENGINE, CPU_MODEL
from llumnix.core.config import SwapConfig
from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.messages.serving import RequestSpec
from llumnix.core.sampling import SamplingParams
from llumnix.instance.copy_ladder import PoolShape, Rows, Rung
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.kv_pool import KvPool, host_pool
from llumnix.instance.swap_calibration import move
from llumnix.instance.torch_executor import TorchExecutor
from llumnix.kernels.copies import Mover, mover

REQUESTS, PROMPT_TOKENS, WARM_UP_STEPS = 8, 256, 20
ROUND_STEPS, ROUNDS = 20, 12
SWAP_BLOCKS, EVERY_S = 64, 0.01


@dataclass(frozen=True, slots=True)
class StepsBeside:
    """Decode steps with swaps ``beside`` them: none, or of ``mb_s`` megabytes a second in both directions
    together, each taking ``swap_ms_p50``."""

    beside: str
    step_ms_p50: float
    step_ms_mean: float
    mb_s: float
    swap_ms_p50: float


def measure_steps(device: torch.device, seed: int) -> list[StepsBeside]:
    """A row per way of copying. Ways take turns."""
    config = replace(CPU_ENGINE, device=device.type, kv_blocks=1024)
    executor = TorchExecutor.from_random(CPU_MODEL, config, seed=seed, pool_name="bench-swap-steps")
    engine = InProcessEngine(executor, config)
    for number in range(REQUESTS):
        engine.submit(_request(number), perf_counter())
    for _ in range(WARM_UP_STEPS + REQUESTS):
        engine.step(perf_counter)
    pool = KvPool(executor.kv_layout, "bench-swap-beside", device)
    host = host_pool(SwapConfig(host_blocks=executor.kv_layout.blocks), pool)
    assert host is not None
    movers = [mover(pool.bytes_view(), host.bytes_view(), to_host=to_host) for to_host in (True, False)]
    ways = {"nothing": None, "each": Rung.RUN} | ({"batch": Rung.BATCH} if movers[0].batches else {})
    steps: dict[str, list[float]] = {name: [] for name in ways}
    swaps: dict[str, list[float]] = {name: [] for name in ways}
    spent: dict[str, float] = dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):
        for name, rung in ways.items():
            began = perf_counter()
            with _swapping(movers, executor.kv_layout.block_bytes, rung, swaps[name]):
                for _ in range(ROUND_STEPS):
                    steps[name].append(engine.step(perf_counter).duration_s)
            spent[name] += perf_counter() - began
    for closing in (pool, host, executor):
        closing.close()
    moved = SWAP_BLOCKS * pool.layout.block_bytes / 1e6
    return [
        StepsBeside(
            beside=name,
            step_ms_p50=statistics.median(steps[name]) * 1e3,
            step_ms_mean=statistics.mean(steps[name]) * 1e3,
            mb_s=len(swaps[name]) * moved / spent[name],
            swap_ms_p50=statistics.median(swaps[name] or [0.0]) * 1e3,
        )
        for name in ways
    ]


@contextmanager
def _swapping(
    movers: Sequence[Mover], block_bytes: int, rung: Rung | None, taken_s: list[float]
) -> Iterator[None]:
    """Swap in the background, a request out or in every EVERY_S; the seconds of each go to ``taken_s``."""
    ending = threading.Event()
    shape = PoolShape.block_first(block_bytes)

    def work(rung: Rung) -> None:
        number, due = 0, perf_counter()
        while not ending.wait(max(0.0, due - perf_counter())):
            began = perf_counter()
            move(movers[number % 2], rung, _runs(number), (shape, shape))
            taken_s.append(perf_counter() - began)
            number, due = number + 1, max(due + EVERY_S, perf_counter())

    if rung is None:
        yield
        return
    worker = threading.Thread(target=work, args=(rung,), daemon=True)
    worker.start()
    try:
        yield
    finally:
        ending.set()
        worker.join()


def _runs(number: int) -> Rows:
    """Three runs, at other places every time, as swaps have them."""
    first = number * SWAP_BLOCKS * 2 % 512
    lengths = np.array([SWAP_BLOCKS // 2, SWAP_BLOCKS // 4, SWAP_BLOCKS // 4])
    starts = first + np.array([0, SWAP_BLOCKS, 2 * SWAP_BLOCKS])
    return np.stack((starts, starts, lengths), axis=1).astype(np.int64)


def _request(number: int) -> RequestSpec:
    steps = WARM_UP_STEPS + REQUESTS + 3 * ROUNDS * ROUND_STEPS
    return RequestSpec(
        request_id=f"r{number}",
        epoch=FIRST_EPOCH,
        frontend_address="",
        prompt_tokens=tuple(range(number, number + PROMPT_TOKENS)),
        output_tokens=(),
        sampling=SamplingParams(max_tokens=steps + 1, seed=number, temperature=0.0, ignore_eos=True),
        waited_s=0.0,
    )
