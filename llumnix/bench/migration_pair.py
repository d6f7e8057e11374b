"""Two instances with a small random model for the migration benchmark, and the ear that hears their
tokens.

``ThreadPair`` runs both on threads of this process without any socket, for a GPU and for machines without
ZeroMQ; migration_processes.py has the pair that is served as in production. Both hand everything that
instances say to one ``heard(message, at)``, where ``at`` is this process's monotonic clock.
"""

import ctypes
import os
import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from llumnix.core.config import Config
from llumnix.core.effects import Send
from llumnix.core.errors import TransportError
from llumnix.core.messages.control import InstanceHello, InstanceRole, KvEndpoint
from llumnix.instance.agent import Agent, Effect, StartRead
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.torch_executor import TorchExecutor
from llumnix.migration.transports import inprocess
from llumnix.migration.transports.base import BlockReader, ReadStats, host_identity
from llumnix.migration.transports.factory import Readers

NAMES = ("a", "b")
IDLE_WAIT_S = 0.1
READ_TIMEOUT_S = 30.0
MEMCPY_REPEATS = 5
COLD_BYTES = 128 << 20
MODEL = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    layers=8,
    heads=8,
    kv_heads=4,
    head_dim=64,
    max_len=16384,
)
"""The shape of a Llama with grouped heads, small: 8 KiB of KV a token in bfloat16."""

Heard = Callable[[object, float], None]


class Pair(Protocol):
    """Two running instances. ``hellos`` says who they are; ``reads`` and ``memcpy`` are those of one of
    them."""

    @property
    def hellos(self) -> dict[str, InstanceHello]: ...

    @property
    def my_address(self) -> str:
        """Where instances send what ``heard`` is told."""
        ...

    def send(self, name: str, message: object) -> None: ...

    def reads(self, name: str) -> list[ReadStats]:
        """Reads done since last asked."""
        ...

    def memcpy_gb_s(self, name: str, size_bytes: int) -> float:
        """Speed of a plain copy of that many bytes there, with the engine running."""
        ...

    def close(self) -> None: ...


PairMaker = Callable[[Config, int, Heard], Pair]


class RecordingReaders:
    """A ReaderFactory that keeps what each read cost."""

    def __init__(self, inner: Readers) -> None:
        self._inner = inner
        self.stats: list[ReadStats] = []

    def open(self, endpoint: KvEndpoint) -> BlockReader:
        return _RecordingReader(self._inner.open(endpoint), self.stats)


class _RecordingReader:
    def __init__(self, inner: BlockReader, stats: list[ReadStats]) -> None:
        self._inner = inner
        self._stats = stats

    def read(
        self,
        source_blocks: Sequence[int],
        target_blocks: Sequence[int],
        timeout_s: float,
        *,
        urgent: bool = False,
        rests: bool = True,
    ) -> ReadStats:
        stats = self._inner.read(source_blocks, target_blocks, timeout_s, urgent=urgent, rests=rests)
        self._stats.append(stats)
        return stats

    def close(self) -> None:
        self._inner.close()


def plain_copy_gb_s(size_bytes: int, device: torch.device) -> float:
    """One plain copy of ``size_bytes`` between two buffers, in GB/s: the median of a few, each of bytes
    that no cache holds, as KV is when it is moved. All pages have been touched before."""
    repeats = max(MEMCPY_REPEATS, -(-COLD_BYTES // size_bytes))
    shape = (repeats, size_bytes)
    source, target = (torch.ones(shape, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for row in range(repeats):
        begin = time.perf_counter()
        if device.type == "cuda":
            target[row].copy_(source[row])
            torch.cuda.synchronize(device)
        else:
            ctypes.memmove(target[row].data_ptr(), source[row].data_ptr(), size_bytes)
        times.append(time.perf_counter() - begin)
    return size_bytes / statistics.median(times) / 1e9


class PoolHolder(Protocol):
    """Whoever owns the memory that the other instance reads."""

    @property
    def pool(self) -> KvPool: ...

    @property
    def host_pool(self) -> KvPool | None: ...


def make_hello(
    name: str, address: str, max_model_len: int, holder: PoolHolder, blocks_address: str
) -> InstanceHello:
    """Who an instance of this process is; its pool's name serves as incarnation."""
    pool, host = holder.pool, holder.host_pool
    return InstanceHello(
        instance_id=name,
        incarnation=pool.pool_name,
        address=address,
        role=InstanceRole.NEUTRAL,
        model="random",
        max_model_len=max_model_len,
        kv_layout=pool.layout,
        kv_endpoint=_endpoint(pool, blocks_address),
        host_endpoint=None if host is None else _endpoint(host, blocks_address),
    )


def _endpoint(pool: KvPool, address: str) -> KvEndpoint:
    return KvEndpoint(host_identity(), os.getpid(), pool.fd, pool.pool_name, address)


def pools_of(holder: PoolHolder) -> list[KvPool]:
    """All that the other instance may read."""
    return [holder.pool] if holder.host_pool is None else [holder.pool, holder.host_pool]


class ThreadPair:
    """See the module."""

    def __init__(self, config: Config, seed: int, heard: Heard) -> None:
        self.my_address = "benchmark"
        self._heard = heard
        self._instances: dict[str, _ThreadInstance] = {}
        for name in NAMES:
            executor = TorchExecutor.from_random(
                MODEL, config.engine, seed=seed, pool_name=f"bench-{name}", swap=config.swap
            )
            self._instances[name] = _ThreadInstance(config, name, executor, self._carry)
        self.hellos = {name: instance.hello for name, instance in self._instances.items()}
        for instance in self._instances.values():
            instance.start()

    def send(self, name: str, message: object) -> None:
        self._instances[name].post(message)

    def reads(self, name: str) -> list[ReadStats]:
        stats = self._instances[name].readers.stats
        taken, stats[:] = list(stats), []
        return taken

    def memcpy_gb_s(self, name: str, size_bytes: int) -> float:
        return plain_copy_gb_s(size_bytes, self._instances[name].device)

    def close(self) -> None:
        for instance in self._instances.values():
            instance.close()

    def _carry(self, send: Send) -> None:
        if send.address == self.my_address:
            self._heard(send.message, time.monotonic())
        else:
            self._instances[send.address].post(send.message)


@dataclass(frozen=True, slots=True)
class _ReadEnded:
    migration_id: str
    stage: int
    outcome: ReadStats | TransportError


class _ThreadInstance:
    """An engine thread as in runtime/instance_server.py, with queues of this process for a network."""

    def __init__(
        self, config: Config, name: str, executor: TorchExecutor, carry: Callable[[Send], None]
    ) -> None:
        for pool in pools_of(executor):
            inprocess.offer(pool)
        self.hello = make_hello(name, name, executor.max_model_len, executor, "")
        self.readers = RecordingReaders(Readers(executor.pool, config.migration))
        self.device = executor.pool.tensor.device
        self._executor = executor
        self._engine = InProcessEngine(executor, config.engine, swap=config.swap)
        self._engine.configure(config.scheduler)
        self._agent = Agent(
            self.hello, self._engine, config.migration, config.cluster.report_interval_s, "benchmark"
        )
        self._carry = carry
        self._inbox: queue.SimpleQueue[tuple[object, float]] = queue.SimpleQueue()
        self._open: dict[str, BlockReader] = {}
        self._copiers = ThreadPoolExecutor(config.migration.incoming_max)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, message: object) -> None:
        self._inbox.put((message, time.monotonic()))

    def close(self) -> None:
        self._stopping = True
        self.post(None)
        self._thread.join()
        self._copiers.shutdown()
        for pool in pools_of(self._executor):
            inprocess.withdraw(pool)
        self._executor.close()

    def _run(self) -> None:
        self._perform(self._agent.start(time.monotonic()))
        while not self._stopping:
            self._take_inbox(0.0 if self._engine.has_work() else IDLE_WAIT_S)
            self._perform(self._agent.tick(time.monotonic()))
            self._hold()
            if self._engine.has_work() and not self._stopping:
                result = self._engine.step(time.monotonic)
                self._perform(self._agent.after_step(result, time.monotonic()))

    def _hold(self) -> None:
        while True:
            now = time.monotonic()
            until = self._agent.hold_until(now)
            if until is None or not self._take_inbox(until - now):
                return

    def _take_inbox(self, wait_s: float) -> bool:
        came = False
        while True:
            try:
                message, at = self._inbox.get(timeout=wait_s) if wait_s > 0 else self._inbox.get_nowait()
            except queue.Empty:
                return came
            came, wait_s, now = True, 0.0, time.monotonic()
            if isinstance(message, _ReadEnded):
                self._perform(
                    self._agent.read_ended(message.migration_id, message.stage, message.outcome, now)
                )
            elif message is not None:
                self._perform(self._agent.handle(message, now, at))

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._carry(effect)
            elif isinstance(effect, StartRead):
                self._copiers.submit(self._read, effect)
            else:
                self._open.pop(effect.pool_name).close()

    def _read(self, order: StartRead) -> None:
        outcome: ReadStats | TransportError
        try:
            reader = self._open.get(order.endpoint.pool_name)
            if reader is None:
                reader = self._open[order.endpoint.pool_name] = self.readers.open(order.endpoint)
            outcome = reader.read(
                order.source_blocks,
                order.target_blocks,
                READ_TIMEOUT_S,
                urgent=order.final,
                rests=order.rests,
            )
        except TransportError as error:
            outcome = error
        self.post(_ReadEnded(order.migration_id, order.stage, outcome))
