"""Puts one instance together from its configuration: executor and engine, the ways its KV can be read, agent
and server. The only place that knows which executor a configuration means."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from llumnix.core.config import Config
from llumnix.core.messages.control import InstanceHello, KvEndpoint
from llumnix.core.roles import starting_role
from llumnix.instance.agent import Agent
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


def build_executor(config: Config, pool_name: str) -> TorchExecutor | RealTimeSimulatedExecutor:
    """The executor a configuration asks for, its model loaded and its KV pool allocated. Raises
    ConfigurationError."""
    engine = config.engine
    if engine.kind == "simulated":
        return RealTimeSimulatedExecutor(engine, pool_name, config.swap)
    if engine.threads == 0 and engine.device != "cuda":
        engine = replace(engine, threads=max(1, (os.cpu_count() or 1) // config.cluster.instances))
    return TorchExecutor(engine, pool_name, swap=config.swap)


class Instance:
    """One instance with all it owns. ``start`` it in the event loop that made it, ``close`` it there too."""

    def __init__(
        self,
        config: Config,
        identity: InstanceIdentity,
        executor: TorchExecutor | RealTimeSimulatedExecutor,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._executor = executor
        inprocess.offer(executor.pool)
        self._blocks = BlockServer(executor.pool, config.cluster.bind_host)
        engine = InProcessEngine(executor, config.engine, swap=config.swap)
        engine.configure(config.scheduler)

        def make_agent(address: str) -> Agent:
            hello = InstanceHello(
                instance_id=identity.instance_id,
                incarnation=identity.incarnation,
                address=address,
                role=starting_role(config.cluster, identity.instance_id),
                model=served_name(config.engine, config.frontend.served_model_name),
                max_model_len=engine.max_model_len,
                kv_layout=executor.kv_layout,
                kv_endpoint=kv_endpoint(executor.pool, self._blocks.address),
            )
            return Agent(
                hello, engine, config.migration, config.cluster.report_interval_s, identity.manager_address
            )

        self.server = InstanceServer(
            config,
            engine=engine,
            make_agent=make_agent,
            readers=Readers(executor.pool, config.migration),
            on_failure=on_failure,
        )

    async def close(self) -> None:
        """Stop serving, then give the memory up."""
        await self.server.close()
        self._blocks.close()
        inprocess.withdraw(self._executor.pool)
        self._executor.close()


def kv_endpoint(pool: KvPool, address: str) -> KvEndpoint:
    """How other instances reach this process's pool."""
    return KvEndpoint(
        host=host_identity(), pid=os.getpid(), fd=pool.fd, pool_name=pool.pool_name, address=address
    )


async def make_instance(
    config: Config, identity: InstanceIdentity, on_failure: Callable[[BaseException], None]
) -> Instance:
    """Load the model off the loop, then put the instance together on it. Raises ConfigurationError."""
    executor = await asyncio.to_thread(
        build_executor, config, f"{identity.instance_id}-{identity.incarnation}"
    )
    return Instance(config, identity, executor, on_failure)
