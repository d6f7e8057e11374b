"""Two instances with a small random model for the migration benchmark, and the ear that hears their tokens.

``ProcessPair`` runs each in a process of its own, served as in production over real sockets, without Ray.
``ThreadPair`` runs both on threads of this process without any socket, for machines without ZeroMQ and for a GPU.
Both hand everything that instances say to one ``heard(message, at)``, where ``at`` is this process's monotonic clock.
"""

import asyncio
import ctypes
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Protocol

import torch

from llumnix.core.config import Config
from llumnix.core.effects import Send
from llumnix.core.errors import LlumnixError, TransportError
from llumnix.core.messages.control import InstanceHello, InstanceRole, KvEndpoint
from llumnix.instance.agent import Agent, CloseReader, StartRead
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.torch_executor import TorchExecutor
from llumnix.migration.transports.base import BlockReader, ReadStats, host_identity
from llumnix.migration.transports.factory import Readers

NAMES = ("a", "b")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
MEMCPY_REPEATS = 5
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
    """Two running instances. ``hellos`` says who they are; ``reads`` and ``memcpy`` are those of one of them."""

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
        """Best of a few plain copies of that many bytes there, with the engine running."""
        ...

    def close(self) -> None: ...


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

    def read(self, source_blocks: Sequence[int], target_blocks: Sequence[int], timeout_s: float) -> ReadStats:
        stats = self._inner.read(source_blocks, target_blocks, timeout_s)
        self._stats.append(stats)
        return stats

    def close(self) -> None:
        self._inner.close()


def plain_copy_gb_s(size_bytes: int, device: torch.device) -> float:
    """Copy ``size_bytes`` between two buffers that have been touched before; the best of a few, in GB/s."""
    source, target = (torch.ones(size_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(MEMCPY_REPEATS):
        begin = time.perf_counter()
        if device.type == "cuda":
            target.copy_(source)
            torch.cuda.synchronize(device)
        else:
            ctypes.memmove(target.data_ptr(), source.data_ptr(), size_bytes)
        best = min(best, time.perf_counter() - begin)
    return size_bytes / best / 1e9


def _hello(name: str, address: str, executor: TorchExecutor, engine: InProcessEngine, blocks: str) -> InstanceHello:
    import os

    pool = executor.pool
    return InstanceHello(
        instance_id=name,
        incarnation=pool.pool_name,
        address=address,
        role=InstanceRole.NEUTRAL,
        model="random",
        max_model_len=engine.max_model_len,
        kv_layout=executor.kv_layout,
        kv_endpoint=KvEndpoint(host_identity(), os.getpid(), pool.fd, pool.pool_name, blocks),
    )
