"""The copier in virtual time keeps the order of the real one and charges what the ladder says."""

import pytest

from llumnix.core.config import SwapConfig
from llumnix.core.messages.control import KvLayout
from llumnix.instance.swap import SwapDirection, SwapDone, SwapJob
from llumnix.sim.swap import HOST_LINKS, VirtualCopier

LLAMA_8B = KvLayout(blocks=2000, layers=32, kv_heads=8, block_size=16, head_dim=128, dtype="bfloat16")
OUT, IN = SwapDirection.OUT, SwapDirection.IN


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep_until(self, when: float) -> None:
        assert when >= self.now
        self.now = when


def copier(time: Time, copies: str = "auto") -> VirtualCopier:
    return VirtualCopier(
        HOST_LINKS["pcie4"],
        LLAMA_8B,
        SwapConfig(host_blocks=100, swap_copies=copies),
        now=lambda: time.now,
        sleep_until=time.sleep_until,
    )


def job(job_id: int, direction: SwapDirection, device: range, host: range) -> SwapJob:
    return SwapJob(job_id, "r", direction, tuple(device), tuple(host))


def test_directions_overlap_and_jobs_of_one_do_not() -> None:
    time = Time()
    swaps = copier(time)
    one_s = swaps.cost_s(50, 1)
    swaps.begin([job(1, OUT, range(50), range(50)), job(2, OUT, range(50, 100), range(50, 100))])
    swaps.begin([job(3, IN, range(200, 250), range(100, 150))])
    assert swaps.ready_at([1]) == swaps.ready_at([3]) == pytest.approx(one_s)
    assert swaps.ready_at([1, 2, 3]) == pytest.approx(2 * one_s)
    assert swaps.done() == []
    swaps.wait([1])
    assert time.now == pytest.approx(one_s) and swaps.done() == [SwapDone(1), SwapDone(3)]
    swaps.wait([1, 2])
    assert swaps.done() == [SwapDone(2)] and swaps.ready_at([2]) == time.now


def test_a_job_begins_after_those_on_its_blocks() -> None:
    time = Time()
    swaps = copier(time)
    swaps.begin([job(1, OUT, range(50), range(50)), job(2, IN, range(200, 250), range(50))])
    assert swaps.ready_at([2]) == pytest.approx(2 * swaps.cost_s(50, 1))


def test_a_block_costs_what_its_pieces_cost() -> None:
    """Per-block swapping of a tensor per layer against one copy of a run, over PCIe 4 and 16 lanes."""
    pieces, runs = copier(Time(), "piece"), copier(Time(), "run")
    kib32 = 32768 / 24.5e9
    assert pieces.cost_s(1, 1) == pytest.approx(64 * (14.69e-6 + kib32), rel=0.01)
    assert runs.cost_s(100, 1) == pytest.approx(100 * 64 * kib32, rel=0.01)
    pieces.begin([job(1, OUT, range(10), range(10))])
    runs.begin([job(1, OUT, range(10), range(10))])
    assert pieces.totals()[OUT].copies == 640 and runs.totals()[OUT].copies == 1
