"""Puts one instance together from its configuration: engine, the ways its KV can be read, agent and server.
The only place that knows which engine a configuration means."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from llumnix.core.config import Config, EngineConfig, SwapConfig, parse_lora_modules
from llumnix.core.messages.control import InstanceHello, KvEndpoint, KvLayout
from llumnix.core.roles import starting_role
from llumnix.instance.agent import Agent
from llumnix.instance.engine import SteppedEngine
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.real_time_simulated_executor import RealTimeSimulatedExecutor
from llumnix.instance.torch_executor import TorchExecutor
from llumnix.migration.transports import inprocess
from llumnix.migration.transports.base import host_identity
from llumnix.migration.transports.factory import Readers
from llumnix.migration.transports.zmq_server import BlockServer
from llumnix.runtime.instance_server import InstanceServer
from llumnix.runtime.model_info import served_name


@dataclass(frozen=True, slots=True)
class InstanceIdentity:
    """Which instance this is, and where its manager listens."""

    instance_id: str
    incarnation: str
    manager_address: str


class KvHolder(Protocol):
    """What owns the memory that peers read: an executor, or an engine with its own."""

    @property
    def pool(self) -> KvPool: ...

    @property
    def host_pool(self) -> KvPool | None:
        """Where it swaps to; None: nowhere."""
        ...

    @property
    def kv_layout(self) -> KvLayout: ...

    def close(self) -> None:
        """Give it up."""
        ...


def build_engine(config: Config, pool_name: str) -> tuple[SteppedEngine, KvHolder]:
    """The engine a configuration asks for, its model loaded and its KV pool allocated. Raises
    ConfigurationError."""
    if config.engine.kind == "vllm":
        from llumnix.instance.vllm_engine import VllmEngine  # needs vLLM, which few have

        vllm = VllmEngine(_with_threads(config), pool_name)
        return vllm, vllm
    executor = build_executor(config, pool_name)
    return InProcessEngine(executor, config.engine, swap=config.swap), executor


def build_executor(config: Config, pool_name: str) -> TorchExecutor | RealTimeSimulatedExecutor:
    """The executor of an engine of ours. Raises ConfigurationError."""
    if config.engine.kind == "simulated":
        return RealTimeSimulatedExecutor(config.engine, pool_name, _share_of_host(config))
    return TorchExecutor(_with_threads(config), pool_name, swap=_share_of_host(config))


def _share_of_host(config: Config) -> SwapConfig:
    """The settings of swapping, this instance's part of the host's memory in them."""
    return replace(config.swap, host_share=config.swap.host_share / config.cluster.instances)


def _with_threads(config: Config) -> EngineConfig:
    """The engine's settings, the machine's cores shared evenly if nothing else is said."""
    if config.engine.threads or config.engine.device == "cuda":
        return config.engine
    return replace(config.engine, threads=max(1, (os.cpu_count() or 1) // config.cluster.instances))


class Instance:
    """One instance with all it owns. ``start`` it in the event loop that made it, ``close`` it there too."""

    def __init__(
        self,
        config: Config,
        identity: InstanceIdentity,
        engine: SteppedEngine,
        holder: KvHolder,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._holder = holder
        host = holder.host_pool
        self._pools = [holder.pool] if host is None else [holder.pool, host]
        for pool in self._pools:
            inprocess.offer(pool)
        self._blocks = BlockServer(self._pools, config.cluster.bind_host)
        engine.configure(config.scheduler)

        def make_agent(address: str) -> Agent:
            hello = InstanceHello(
                instance_id=identity.instance_id,
                incarnation=identity.incarnation,
                address=address,
                role=starting_role(config.cluster, identity.instance_id),
                model=served_name(config.engine, config.frontend.served_model_name),
                max_model_len=engine.max_model_len,
                kv_layout=holder.kv_layout,
                kv_endpoint=kv_endpoint(holder.pool, self._blocks.address),
                host_endpoint=None if host is None else kv_endpoint(host, self._blocks.address),
                adapters=tuple(sorted(parse_lora_modules(config.engine.lora_modules))),
            )
            return Agent(
                hello, engine, config.migration, config.cluster.report_interval_s, identity.manager_address
            )

        self.server = InstanceServer(
            config,
            engine=engine,
            make_agent=make_agent,
            readers=engine.readers(Readers(holder.pool, config.migration)),
            on_failure=on_failure,
        )

    async def close(self) -> None:
        """Stop serving, then give the memory up."""
        await self.server.close()
        self._blocks.close()
        for pool in self._pools:
            inprocess.withdraw(pool)
        self._holder.close()


def kv_endpoint(pool: KvPool, address: str) -> KvEndpoint:
    """How other instances reach this process's pool."""
    return KvEndpoint(
        host=host_identity(), pid=os.getpid(), fd=pool.fd, pool_name=pool.pool_name, address=address
    )


async def make_instance(
    config: Config, identity: InstanceIdentity, on_failure: Callable[[BaseException], None]
) -> Instance:
    """Load the model off the loop, then put the instance together on it. Raises ConfigurationError."""
    pool_name = f"{identity.instance_id}-{identity.incarnation}"
    engine, holder = await asyncio.to_thread(build_engine, config, pool_name)
    return Instance(config, identity, engine, holder, on_failure)
