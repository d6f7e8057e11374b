"""The copier moves the right bytes on every rung, in an order that keeps jobs out of each other's way, and
reports every job once, whatever becomes of it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from llumnix.core.config import SwapConfig
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import KvLayout
from llumnix.instance import swap_copier
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.swap import SwapDirection, SwapDone, SwapJob
from llumnix.instance.swap_lane import SwapLane
from llumnix.instance.swap_order import SwapOrder
from llumnix.instance.swap_space import SwapSpace

LAYOUT = KvLayout(blocks=32, layers=3, kv_heads=2, block_size=4, head_dim=8, dtype="bfloat16")
OUT, IN = SwapDirection.OUT, SwapDirection.IN


def job(job_id: int, direction: SwapDirection, device: list[int], host: list[int]) -> SwapJob:
    return SwapJob(job_id, f"r{job_id}", direction, tuple(device), tuple(host))


@contextmanager
def swap_space(copies: str = "auto", host_blocks: int = 40) -> Iterator[tuple[torch.Tensor, SwapSpace]]:
    """A device pool full of noise, as bytes, and the space beside it."""
    pool = KvPool(LAYOUT, "swap-test", torch.device("cpu"))
    space = SwapSpace.beside(pool, SwapConfig(host_blocks=host_blocks, swap_copies=copies))
    assert space is not None
    assert not pool.bytes_view().any() and not space.pool.bytes_view().any(), "calibration left something"
    noise = torch.Generator().manual_seed(7)
    pool.bytes_view().copy_(
        torch.randint(0, 256, pool.bytes_view().shape, dtype=torch.uint8, generator=noise)
    )
    yield pool.bytes_view(), space
    space.close()
    pool.close()


COUNTED = {"auto": None, "run": 2, "staging": 1, "block": 5, "piece": 30}


@pytest.mark.parametrize(("copies", "counted"), COUNTED.items())
def test_blocks_go_out_and_come_back_elsewhere(copies: str, counted: int | None) -> None:
    with swap_space(copies) as (device, space):
        before = device.clone()
        copier, host = space.copier, space.pool.bytes_view()
        copier.begin([job(1, OUT, [4, 3, 2, 9, 10], [30, 29, 28, 7, 8])])
        copier.wait([1])
        assert copier.done() == [SwapDone(1)] and copier.done() == []
        assert torch.equal(host[[30, 29, 28, 7, 8]], before[[4, 3, 2, 9, 10]])
        assert host.any(dim=1).nonzero().flatten().tolist() == [7, 8, 28, 29, 30]
        assert torch.equal(device, before)
        copier.begin([job(2, IN, [20, 21, 22], [28, 29, 30])])
        copier.wait([2])
        assert torch.equal(device[20:23], before[2:5])
        totals = copier.totals()[OUT]
        assert (totals.jobs, totals.blocks, totals.errors) == (1, 5, 0)
        assert counted is None or totals.copies == counted


def test_a_copy_larger_than_the_staging_buffer_goes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llumnix.kernels.copies.STAGING_BYTES", 3 * LAYOUT.block_bytes)
    with swap_space("staging") as (device, space):
        space.copier.begin([job(1, OUT, list(range(0, 32, 2)), list(range(16)))])
        space.copier.wait([1])
        assert torch.equal(space.pool.bytes_view()[:16], device[::2])


def test_jobs_wait_for_earlier_ones_on_the_same_blocks() -> None:
    """Swap-ins and swap-outs run on two threads, and still do what one after the other would."""
    with swap_space() as (device, space):
        before = device.clone()
        jobs = []
        for number in range(40):
            shift = number % 4
            jobs.append(job(2 * number, OUT, [shift, 8 + shift], [10, 11]))
            jobs.append(job(2 * number + 1, IN, [16 + number % 8, 24 + number % 8], [10, 11]))
        space.copier.begin(jobs)
        space.copier.wait(range(80))
        for number in range(32, 40):
            assert torch.equal(device[16 + number % 8], before[number % 4])
            assert torch.equal(device[24 + number % 8], before[8 + number % 4])
        assert sorted(done.job_id for done in space.copier.done()) == list(range(80))


def test_a_failed_copy_is_told_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = SwapLane.copy

    def fails_once(self: SwapLane, job: SwapJob) -> None:
        if job.job_id == 1:
            raise RuntimeError("the bus fell off")
        copy(self, job)

    monkeypatch.setattr(SwapLane, "copy", fails_once)
    with swap_space() as (device, space):
        space.copier.begin([job(1, OUT, [0], [0]), job(2, OUT, [1], [1])])
        space.copier.wait([1, 2])
        assert space.copier.done() == [SwapDone(1, "the bus fell off"), SwapDone(2)]
        assert torch.equal(space.pool.bytes_view()[1], device[1])
        assert space.copier.totals()[OUT].errors == 1


def test_every_job_is_reported_when_the_queue_is_full_or_the_copier_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered, let_go = threading.Event(), threading.Event()
    copy = SwapLane.copy

    def held(self: SwapLane, job: SwapJob) -> None:
        entered.set()
        let_go.wait()
        copy(self, job)

    monkeypatch.setattr(SwapLane, "copy", held)
    monkeypatch.setattr(swap_copier, "JOBS_MAX", 3)
    with swap_space() as (_, space):
        copier = space.copier
        copier.begin([job(number, OUT, [number], [number]) for number in range(5)])
        assert [done.job_id for done in copier.done()] == [3, 4]
        entered.wait()
        copier.begin([])
        closing = threading.Thread(target=copier.close)
        closing.start()
        let_go.set()
        closing.join()
        copier.wait([0, 1, 2])
        ended = {done.job_id: done.error for done in copier.done()}
        assert set(ended) == {0, 1, 2} and ended[0] == ""
        copier.begin([job(9, OUT, [0], [0])])
        assert copier.done() == [SwapDone(9, "the copier is closed")]


@pytest.mark.parametrize(("device", "host"), [([32], [0]), ([0], [40]), ([-1], [0])])
def test_a_block_beyond_its_pool_is_never_touched(device: list[int], host: list[int]) -> None:
    with swap_space() as (_, space), pytest.raises(InvariantError, match="beyond the"):
        space.copier.begin([job(1, OUT, device, host)])


def test_estimates_grow_with_blocks() -> None:
    with swap_space() as (_, space):
        assert 0 < space.copier.cost_s(1, 1) <= space.copier.cost_s(30, 1) <= space.copier.cost_s(30, 30)


def test_no_host_memory_is_no_swap_space() -> None:
    pool = KvPool(LAYOUT, "swap-none", torch.device("cpu"))
    assert SwapSpace.beside(pool, SwapConfig(host_share=0.0)) is None
    assert SwapSpace.beside(pool, None) is None
    pool.close()


def test_order_holds_only_what_is_outstanding() -> None:
    order = SwapOrder()
    assert order.begin(job(1, OUT, [1, 2], [11, 12])) == set()
    assert order.begin(job(2, IN, [3], [12])) == {1}
    assert order.begin(job(3, OUT, [2, 3], [13, 14])) == {1, 2}
    order.end(1)
    assert order.begin(job(4, IN, [1, 2], [20, 21])) == {3}
    for job_id in (2, 3, 4):
        order.end(job_id)
    assert len(order) == 0
    assert order.begin(job(5, OUT, [1, 2, 3], [11, 12, 13])) == set()
    with pytest.raises(InvariantError, match="twice"):
        order.begin(job(5, OUT, [6], [16]))
    with pytest.raises(InvariantError, match="pairs 1 device blocks with 2 host"):
        order.begin(job(6, OUT, [6], [16, 17]))
