"""Ranks in processes of their own, over KV made up for them, without vLLM: what is copied through a pool is
whole, whatever the number of ranks on either side, and none of them outlives the others or its instance."""

import multiprocessing
import os
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest
import torch

from llumnix.core.errors import ConfigurationError, TransportError
from llumnix.core.messages.control import KvLayout
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.vllm_exchange import Exchange
from llumnix.instance.vllm_layout import BlockShape, KvCopier, learn_packing
from llumnix.instance.vllm_rank import join
from llumnix.instance.vllm_ranks import Ranks

LAYERS, HEADS, DIM = 2, 2, 16
WAIT_S = 60.0
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["llumnix.instance.vllm_ranks", "llumnix.instance.vllm_rank"])


def layout(blocks: int = 0) -> KvLayout:
    return KvLayout(blocks, LAYERS, HEADS, 16, DIM, "float32")


def run_rank(
    pool_name: str, rank: int, ranks: int, block_size: int, fails: str = "", init_method: str = ""
) -> None:
    """The main of a rank: KV of zeros, ``[blocks, size, heads, 2, dim]`` a layer."""
    here = join(pool_name, rank, ranks, init_method)
    if fails:
        here.tell(ConfigurationError(fails))
        return
    shape = BlockShape(8, block_size, here.heads(HEADS).count, DIM)
    layers = [torch.zeros(8, block_size, shape.kv_heads, 2, DIM) for _ in range(LAYERS)]

    def write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        for row, slot in enumerate(slots.tolist()):
            layers[0][slot // block_size, slot % block_size] = torch.stack((keys[row], values[row]), dim=1)

    here.know(layout(), KvCopier(layers, learn_packing(layers[0], shape, write), shape))
    time.sleep(10 * WAIT_S)


class Started:
    """An instance's side with its ranks."""

    def __init__(
        self,
        name: str,
        count: int,
        block_size: int = 32,
        fails: str = "",
        blocks: int = 12,
        init_method: str = "",
    ) -> None:
        def make_pool(shape: KvLayout) -> KvPool:
            if blocks == 0:
                raise ConfigurationError("no memory at all")
            return KvPool(layout(blocks), name, torch.device("cpu"))

        self.exchange = Exchange(make_pool)
        self.ranks = Ranks(self.exchange, name, count)
        self.processes: list[BaseProcess] = [
            PROCESSES.Process(
                target=run_rank, args=(name, rank, count, block_size, fails if rank else "", init_method)
            )
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def wait_ready(self) -> None:
        give_up_at = time.monotonic() + WAIT_S
        while not self.ranks.shape.blocks:
            assert time.monotonic() < give_up_at and not self.ranks.lost, self.ranks.lost
            time.sleep(0.02)

    def ended(self) -> bool:
        for process in self.processes:
            process.join(WAIT_S)
        return not any(process.is_alive() for process in self.processes)


@contextmanager
def started(name: str, count: int, block_size: int = 32, init_method: str = "") -> Iterator[Started]:
    running = Started(f"{name}-{os.getpid()}", count, block_size, init_method=init_method)
    try:
        running.wait_ready()
        yield running
    finally:
        running.ranks.close()
        assert running.ended()


def test_kv_passes_between_different_numbers_of_ranks() -> None:
    tokens = 75
    with started("two", 2) as two, started("four", 4, 16) as four:
        assert (two.ranks.shape, four.ranks.shape) == (
            BlockShape(8, 32, HEADS, DIM),
            BlockShape(8, 16, HEADS, DIM),
        )
        pool, other = two.exchange.pool, four.exchange.pool
        kv = torch.randn(pool.tensor.shape)
        pool.tensor.copy_(kv)
        order, back = (7, 1, 3, 2, 0), (11, 10, 9, 8, 6)
        two.ranks.copy_in(pool, order, (4, 0, 2), first=0, end=64)
        two.ranks.copy_in(pool, order, (4, 0, 2), first=64, end=tokens)
        pool.tensor.zero_()
        two.ranks.copy_out(pool, (4, 0, 2), back, first=0, end=tokens)
        other.tensor.copy_(pool.tensor)
        four.ranks.copy_in(other, back, (1, 2, 3, 4, 5), first=0, end=tokens)
        other.tensor.zero_()
        four.ranks.copy_out(other, (1, 2, 3, 4, 5), order, first=0, end=tokens)
        for place, block in enumerate(order):
            kept = min(16, tokens - 16 * place)
            assert torch.equal(other.tensor[block, :, :, :, :kept], kv[block, :, :, :, :kept])


def test_what_a_rank_cannot_do_is_told() -> None:
    with started("wrong", 2) as two:
        with pytest.raises(TransportError, match=r"rank \d of vLLM: .*out of range"):
            two.ranks.copy_in(two.exchange.pool, (0, 1), (99,), first=0, end=32)
        two.ranks.copy_in(two.exchange.pool, (0, 1), (1,), first=0, end=32)


def test_the_ranks_fall_together() -> None:
    with started("fall", 2) as running:
        victim = running.processes[1]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        assert running.ended()
        with pytest.raises(TransportError, match=r"rank \d of vLLM has ended"):
            running.ranks.copy_in(running.exchange.pool, (0, 1), (1,), first=0, end=32)
        assert running.ranks.lost


@contextmanager
def listening() -> Iterator[Path]:
    """A socket called as vLLM calls its own."""
    file = Path(tempfile.gettempdir()) / str(uuid.uuid4())
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(file))
        end.listen()
        yield file
    file.unlink(missing_ok=True)


@contextmanager
def shared_memory() -> Iterator[Path]:
    memory = SharedMemory(create=True, size=4096)
    file = Path("/dev/shm") / memory.name
    try:
        yield file
    finally:
        memory.close()
        if file.exists():
            memory.unlink()
        else:
            resource_tracker.unregister(f"/{memory.name}", "shared_memory")


def test_memory_that_an_instance_shares_with_its_ranks_loses_its_name() -> None:
    with shared_memory() as others, started("names", 2) as running:
        with shared_memory() as ours:
            running.ranks.started()
            assert [others.exists(), ours.exists()] == [True, False]
        with shared_memory() as ours:
            victim = running.processes[1]
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            assert running.ended()
            give_up_at = time.monotonic() + WAIT_S
            while not running.ranks.lost:
                assert time.monotonic() < give_up_at
                time.sleep(0.02)
            assert [others.exists(), ours.exists()] == [True, False]


def test_sockets_and_the_file_where_ranks_met_lose_their_names_too(tmp_path: Path) -> None:
    met_in = tmp_path / "vllm_dist_0123"
    init_method = f"file://{met_in}"
    met_in.touch()
    with (
        listening() as others,
        started("sockets", 2, init_method=init_method) as running,
        listening() as ours,
    ):
        running.ranks.started()
        assert [others.exists(), ours.exists()] == [True, False]
        assert met_in.exists(), "ranks may still need it"
    assert not met_in.exists()
    with started("killed", 2, init_method=init_method) as running:
        met_in.touch()
        victim = running.processes[1]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        assert running.ended()
        assert not met_in.exists()


def test_a_rank_that_cannot_start_says_why_and_leaves_nothing() -> None:
    running = Started(f"fails-{os.getpid()}", 2, fails="not enough memory on this device")
    give_up_at = time.monotonic() + WAIT_S
    while not running.ranks.lost:
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    assert running.ended()
    running.ranks.close()
    assert running.ranks.failure == "not enough memory on this device"


def test_a_rank_that_comes_when_another_has_failed_ends_too() -> None:
    name = f"late-{os.getpid()}"
    ranks = Ranks(Exchange(lambda shape: KvPool(layout(12), name, torch.device("cpu"))), name, 2)
    first = PROCESSES.Process(target=run_rank, args=(name, 1, 2, 32, "not enough memory on this device"))
    late = PROCESSES.Process(target=run_rank, args=(name, 0, 2, 32))
    first.start()
    first.join(WAIT_S)
    give_up_at = time.monotonic() + WAIT_S
    while not ranks.lost:
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    late.start()
    late.join(WAIT_S)
    assert late.exitcode is not None
    ranks.close()


def test_ranks_hear_that_there_is_no_pool() -> None:
    running = Started(f"none-{os.getpid()}", 2, blocks=0)
    assert running.ended()
    assert running.ranks.lost
    running.ranks.close()


def _instance(name: str, pids: "multiprocessing.Queue[int]") -> None:
    running = Started(name, 2)
    running.wait_ready()
    for process in running.processes:
        pids.put(process.pid or 0)
    time.sleep(10 * WAIT_S)


def test_a_killed_instance_takes_its_ranks_along() -> None:
    pids = PROCESSES.Queue()
    instance = PROCESSES.Process(target=_instance, args=(f"killed-{os.getpid()}", pids))
    instance.start()
    ranks = [pids.get(timeout=WAIT_S) for _ in range(2)]
    instance.kill()
    give_up_at = time.monotonic() + WAIT_S
    while any(alive(pid) for pid in ranks):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    instance.join()


def alive(pid: int) -> bool:
    """A process that nobody has asked how it ended counts as gone."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
