"""A whole cluster without Ray, for tests: real manager, real frontend and real instances on real sockets, all
in one event loop or, where processes are to be killed, with each instance in a process of its own."""

import asyncio
import multiprocessing
import os
import signal
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

from llumnix.api.backend import StreamCall
from llumnix.core.config import (
    ClusterConfig,
    Config,
    EngineConfig,
    FrontendConfig,
    MigrationConfig,
    SchedulerConfig,
)
from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.messages.control import InstanceHello
from llumnix.core.sampling import SamplingParams
from llumnix.instance.simulated_executor import simulated_token
from llumnix.runtime.frontend import Frontend
from llumnix.runtime.instance_factory import Instance, InstanceIdentity, make_instance
from llumnix.runtime.manager_server import ManagerServer

WAIT_S = 30.0
PROCESSES = multiprocessing.get_context("forkserver")


def simulated_config(
    *,
    step_ms: float = 5.0,
    kv_blocks: int = 256,
    pairing: str = "none",
    transport: str = "auto",
    waiting_max: int = 1024,
) -> Config:
    """Simulated engines whose KV is real and checked on every step."""
    return Config(
        engine=EngineConfig(
            kind="simulated", simulated_step_ms=step_ms, kv_blocks=kv_blocks, waiting_max=waiting_max
        ),
        migration=MigrationConfig(transport=transport, answer_timeout_s=1.0, reservation_s=3.0),
        scheduler=SchedulerConfig(pairing_policy=pairing, round_interval_s=0.05, rest_s=0.3),
        frontend=FrontendConfig(silent_probe_s=0.5, place_timeout_s=0.3),
        cluster=ClusterConfig(instances=2),
    )


@dataclass
class LocalCluster:
    """The parts of one cluster. Instances are held by id; those in processes of their own in
    ``processes``."""

    config: Config
    manager: ManagerServer
    frontend: Frontend
    instances: dict[str, Instance] = field(default_factory=dict)
    processes: dict[str, BaseProcess] = field(default_factory=dict)
    hellos: dict[str, InstanceHello] = field(default_factory=dict)

    async def add_instance(self, instance_id: str, config: Config | None = None) -> None:
        """One more, in this process, with settings of its own if they are given."""
        identity = InstanceIdentity(instance_id, uuid.uuid4().hex[:8], self.manager.address)
        instance = self.instances[instance_id] = await make_instance(config or self.config, identity, _fail)
        instance.server.start()

    async def add_process(
        self, instance_id: str, config: Config | None = None, wait_s: float = WAIT_S
    ) -> None:
        """One more, in a process of its own, with settings of its own if they are given."""
        identity = InstanceIdentity(instance_id, uuid.uuid4().hex[:8], self.manager.address)
        process = PROCESSES.Process(
            target=_run,
            args=(config or self.config, identity),
            daemon=(config or self.config).engine.tensor_parallel == 1,  # a daemon may have no ranks
        )
        await asyncio.to_thread(process.start)
        self.processes[instance_id] = process
        async with asyncio.timeout(wait_s):
            while self.row_state(instance_id, identity.incarnation) != "serving":
                await asyncio.sleep(0.01)

    def row_state(self, instance_id: str, incarnation: str = "") -> str:
        """What the manager thinks of an instance; empty if it does not know (this process of) it."""
        for row in self.manager.instances():
            if row.instance_id == instance_id and incarnation in ("", row.incarnation):
                return str(row.state)
        return ""

    def kill(self, instance_id: str) -> None:
        """SIGKILL, and the certainty that the process has ended, as Ray and the kernel give it."""
        process, hello = self.processes.pop(instance_id), self.hellos[instance_id]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        self.manager.instance_ended(instance_id, hello.incarnation)

    async def serving(self, instances: int) -> None:
        """Wait until so many serve and the frontend knows."""
        async with asyncio.timeout(WAIT_S):
            while self.manager.summary().serving < instances or not self.frontend.ready:
                await asyncio.sleep(0.01)

    async def idle(self) -> None:
        """Wait until every instance reports that it holds nothing: no request, no block, no migration."""
        async with asyncio.timeout(WAIT_S):
            while any(
                row.running + row.waiting + row.used_blocks + row.migrating_in + row.migrating_out
                for row in self.manager.instances()
                if row.state != "down"
            ):
                await asyncio.sleep(0.02)


@asynccontextmanager
async def local_cluster(
    config: Config, instances: Sequence[str] = ("i0", "i1"), *, processes: bool = False
) -> AsyncIterator[LocalCluster]:
    """Start a cluster, and leave nothing of it behind."""
    hellos: dict[str, InstanceHello] = {}
    manager = ManagerServer(
        config,
        incarnation="m1",
        port=0,
        on_hello=lambda hello: hellos.__setitem__(hello.instance_id, hello),
        on_lost=lambda address: None,
    )
    frontend = Frontend(config, frontend_id="f1", manager_address=manager.address)
    cluster = LocalCluster(config, manager, frontend, hellos=hellos)
    try:
        add = cluster.add_process if processes else cluster.add_instance
        await asyncio.gather(*(add(instance_id) for instance_id in instances))
        if instances:
            await cluster.serving(len(instances))
        yield cluster
    finally:
        await cluster.frontend.close()
        for instance in cluster.instances.values():
            await instance.close()
        for process in cluster.processes.values():
            process.kill()
            process.join()
        await cluster.manager.close()


async def stream(
    frontend: Frontend,
    request_id: str,
    *,
    tokens: int = 100,
    prompt: int = 40,
    seed: int = 1,
    first_epoch: int = FIRST_EPOCH,
) -> tuple[int, ...]:
    """One request from start to end; its tokens as the client got them."""
    got: list[int] = []
    sampling = SamplingParams(max_tokens=tokens, seed=seed)
    call = StreamCall(request_id, tuple(range(1, prompt + 1)), sampling, first_epoch=first_epoch)
    async for chunk in frontend.open(call):
        assert chunk.first_index == len(got)
        got += chunk.tokens
    return tuple(got)


def expected(*, tokens: int = 100, prompt: int = 40, seed: int = 1) -> tuple[int, ...]:
    """What a simulated engine gives for the same request, undisturbed."""
    return tuple(simulated_token(seed, prompt + index) for index in range(tokens))


def _fail(error: BaseException) -> None:
    raise AssertionError(f"an instance failed: {error!r}") from error


def _run(config: Config, identity: InstanceIdentity) -> None:
    """The main of an instance's own process."""

    async def main() -> None:
        instance = await make_instance(config, identity, lambda error: os._exit(1))
        instance.server.start()
        await asyncio.Event().wait()

    asyncio.run(main())
