"""The pair of instances as it is served in production: two processes, real sockets, shared memory. No Ray."""

import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from llumnix.bench.migration_pair import (
    MODEL,
    NAMES,
    Heard,
    RecordingReaders,
    make_hello,
    plain_copy_gb_s,
    pools_of,
)
from llumnix.core.config import Config
from llumnix.core.errors import TransportError
from llumnix.core.messages.control import InstanceHello
from llumnix.instance.agent import Agent
from llumnix.instance.engine import SteppedEngine
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.torch_executor import TorchExecutor
from llumnix.migration.transports.base import ReadStats
from llumnix.migration.transports.factory import Readers
from llumnix.migration.transports.zmq_server import BlockServer
from llumnix.runtime.bus import Bus
from llumnix.runtime.instance_factory import KvHolder
from llumnix.runtime.instance_server import InstanceServer
from llumnix.runtime.loop_thread import LoopThread, end_process

START_TIMEOUT_S = 240.0
RANDOM = "random"
STOP_TIMEOUT_S = 20.0


class Listener:
    """A bus of this process: what instances say goes to ``heard``."""

    def __init__(self, config: Config, heard: Heard) -> None:
        self._loop = LoopThread("benchmark", end_process)
        self._bus = self._loop.run(_make_bus(config.cluster.bind_host, heard))
        self.address = self._bus.address

    def send(self, address: str, message: object) -> None:
        self._loop.run(_send(self._bus, address, message))

    def close(self) -> None:
        self._loop.run(_close(self._bus))
        self._loop.stop()


class InstanceProcess:
    """One instance in a process of its own, started but not waited for."""

    def __init__(self, config: Config, name: str, seed: int, manager_address: str) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_instance, args=(theirs, config, name, seed, manager_address))
        self._process.start()

    def hello(self) -> InstanceHello:
        """Once it serves. Raises TransportError if that takes too long, or it has ended."""
        try:
            if self._pipe.poll(START_TIMEOUT_S):
                hello: InstanceHello = self._pipe.recv()
                return hello
        except EOFError:
            raise TransportError(f"instance {self._name} did not start") from None
        raise TransportError(f"instance {self._name} did not start within {START_TIMEOUT_S:g} s")

    def ask(self, order: str | int) -> Any:
        """Its answer to ``reads`` or to a size in bytes; see ``_serve``. Raises TransportError if it has
        ended."""
        try:
            self._pipe.send(order)
            return self._pipe.recv()
        except (EOFError, OSError):
            raise TransportError(f"instance {self._name} has ended") from None

    def begin_stop(self) -> None:
        with suppress(OSError):  # it has ended already
            self._pipe.send("stop")

    def stop(self) -> None:
        self.begin_stop()
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class ProcessPair:
    """See the module."""

    def __init__(self, config: Config, seed: int, heard: Heard) -> None:
        self._listener = Listener(config, heard)
        self.my_address = self._listener.address
        self._instances = {name: InstanceProcess(config, name, seed, self.my_address) for name in NAMES}
        try:
            self.hellos = {name: instance.hello() for name, instance in self._instances.items()}
        except TransportError:
            self.close()
            raise

    def send(self, name: str, message: object) -> None:
        self._listener.send(self.hellos[name].address, message)

    def reads(self, name: str) -> list[ReadStats]:
        stats: list[ReadStats] = self._instances[name].ask("reads")
        return stats

    def memcpy_gb_s(self, name: str, size_bytes: int) -> float:
        return float(self._instances[name].ask(size_bytes))

    def close(self) -> None:
        for instance in self._instances.values():
            instance.begin_stop()
        for instance in self._instances.values():
            instance.stop()
        self._listener.close()


async def _make_bus(host: str, heard: Heard) -> Bus:
    return Bus(host, on_message=lambda m: heard(m, time.monotonic()), on_lost=lambda address: None)


async def _send(bus: Bus, address: str, message: object) -> None:
    bus.send(address, message)


async def _close(bus: Bus) -> None:
    bus.close()


def _instance(pipe: Connection, config: Config, name: str, seed: int, manager_address: str) -> None:
    """What an instance's process runs."""
    pool_name = f"bench-{name}-{os.getpid()}"
    engine, holder = _engine(config, seed, pool_name)
    readers = RecordingReaders(Readers(holder.pool, config.migration))
    engine.configure(config.scheduler)
    blocks = BlockServer(pools_of(holder), config.cluster.bind_host)
    asyncio.run(_serve(pipe, config, name, manager_address, engine, holder, readers, blocks))
    blocks.close()
    holder.close()


def _engine(config: Config, seed: int, pool_name: str) -> tuple[SteppedEngine, KvHolder]:
    """An engine with a random model of the benchmark's shape, or vLLM with the model that is asked for. vLLM
    makes up weights for a configuration."""
    if config.engine.kind == "vllm":
        from llumnix.instance.vllm_engine import VllmEngine

        if config.engine.model != RANDOM:
            vllm = VllmEngine(config.engine, pool_name)
            return vllm, vllm
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(llama_json(MODEL)))
            vllm = VllmEngine(replace(config.engine, model=folder), pool_name)
        return vllm, vllm
    executor = TorchExecutor.from_random(
        MODEL, config.engine, seed=seed, pool_name=pool_name, swap=config.swap
    )
    return InProcessEngine(executor, config.engine, swap=config.swap), executor


def llama_json(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a Llama of this shape, for those who only read files."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_len,
        "tie_word_embeddings": model.tied_embeddings,
    }


async def _serve(
    pipe: Connection,
    config: Config,
    name: str,
    manager_address: str,
    engine: SteppedEngine,
    holder: KvHolder,
    readers: RecordingReaders,
    blocks: BlockServer,
) -> None:
    hellos: list[InstanceHello] = []

    def make_agent(address: str) -> Agent:
        hellos.append(make_hello(name, address, engine.max_model_len, holder, blocks.address))
        interval_s = config.cluster.report_interval_s
        return Agent(hellos[0], engine, config.migration, interval_s, manager_address)

    server = InstanceServer(
        config,
        engine=engine,
        make_agent=make_agent,
        readers=engine.readers(readers),
        on_failure=lambda error: os._exit(1),
    )
    server.start()
    pipe.send(hellos[0])
    while True:
        try:
            order = await asyncio.to_thread(pipe.recv)
        except EOFError:
            order = "stop"
        if order == "stop":
            break
        if order == "reads":
            taken, readers.stats[:] = list(readers.stats), []
            pipe.send(taken)
        else:
            speed = await asyncio.to_thread(plain_copy_gb_s, order, holder.pool.tensor.device)
            pipe.send(speed)
    await server.close()
