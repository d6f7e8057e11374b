"""The manager's Ray actor: the orders of administrators, and the instances' lives as Ray knows them.

It starts and stops instance actors, and watches each one's process: only Ray and the operating system can say
that a process has ended for certain, which is what frees a migration whose commit went unanswered. The
scheduling itself is GlobalScheduler's; this class adds nothing to it.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import ray
from ray.exceptions import ActorDiedError, RayActorError

from llumnix.core.admin import (
    ClusterSummary,
    DecisionRow,
    Event,
    InstanceRow,
    MigrationResult,
    PolicyState,
    Refusal,
)
from llumnix.core.config import Config
from llumnix.core.messages.control import InstanceHello, InstanceRole, InstanceState, RequestRow
from llumnix.migration.transports.base import host_identity
from llumnix.runtime.actors import (
    INSTANCE_PREFIX,
    NAMESPACE,
    STOP_TIMEOUT_S,
    ProcessName,
    RemoteInstance,
    actor_name,
    find_instance,
    on_this_host,
)
from llumnix.runtime.loop_thread import LoopThread
from llumnix.runtime.manager_server import ManagerServer

T = TypeVar("T")

FENCE_POLL_S = 0.1
EMPTY_POLL_S = 0.1
EMPTY_TIMEOUT_S = 600.0
CPU_SHARE = 0.001  # Ray spreads over nodes only what asks for something


@dataclass(frozen=True, slots=True)
class ClusterDescription:
    """What a newcomer needs to join in: the configuration, the manager's bus address, and the longest prompt
    + output in tokens that every instance takes (0 before any serves)."""

    config: Config
    manager_address: str
    max_model_len: int


class ManagerActor:
    """One per cluster, named MANAGER_NAME. After a crash it comes back on the same port and finds its
    instances."""

    def __init__(self, config: Config, port: int) -> None:
        self._config = config
        self._loop = LoopThread("manager")
        self._hellos: dict[str, InstanceHello] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self._host = host_identity()
        self._scaling = asyncio.Lock()
        self._leaving: set[str] = set()  # being emptied in order to stop, until a larger number is asked for
        self._server = self._loop.run(self._make_server(port))

    # Orders and questions.

    def describe(self) -> ClusterDescription:
        longest = min((hello.max_model_len for hello in list(self._hellos.values())), default=0)
        return ClusterDescription(self._config, self._server.address, longest)

    def status(self) -> ClusterSummary:
        return self._on_loop(self._server.summary)

    def instances(self) -> tuple[InstanceRow, ...]:
        return self._on_loop(self._server.instances)

    def events(self, after: int, limit: int) -> tuple[Event, ...]:
        return self._on_loop(lambda: self._server.events_after(after, limit))

    def requests(self) -> tuple[RequestRow, ...]:
        return self._loop.run(self._server.requests())

    def migrate(self, request_id: str, target_id: str) -> MigrationResult | Refusal:
        return self._loop.run(self._server.migrate(request_id, target_id))

    def drain(self, instance_id: str) -> InstanceRow | Refusal:
        return self._on_loop(lambda: self._server.set_draining(instance_id, True))

    def resume(self, instance_id: str) -> InstanceRow | Refusal:
        return self._on_loop(lambda: self._server.set_draining(instance_id, False))

    def set_role(self, instance_id: str, role: InstanceRole) -> InstanceRow | Refusal:
        return self._on_loop(lambda: self._server.set_role(instance_id, role))

    def policies(self) -> PolicyState:
        return self._on_loop(self._server.policies)

    def set_policy(self, kind: str, name: str, settings: dict[str, str]) -> PolicyState | Refusal:
        return self._on_loop(lambda: self._server.set_policy(kind, name, settings))

    def explain(self, request_id: str) -> tuple[DecisionRow, ...] | Refusal:
        return self._on_loop(lambda: self._server.explain(request_id))

    def scale(self, instances: int) -> ClusterSummary | Refusal:
        """Start or drain-and-stop instances until there are ``instances``. Returns when that is so."""
        allowed = self._config.cluster.instances_max
        if not 1 <= instances <= allowed:
            return Refusal(f"instances must be within 1 and {allowed}, got {instances}")
        return self._loop.run(self._scale(instances))

    def stop(self) -> None:
        """Stop every instance in order. The actor itself is killed right after."""
        for instance_id in self._instance_ids():
            self._stop_instance(instance_id)
        self._loop.run(self._server.close())

    # In the loop.

    async def _make_server(self, port: int) -> ManagerServer:
        return ManagerServer(
            on_this_host(self._config),
            incarnation=uuid.uuid4().hex[:8],
            port=port,
            on_hello=self._hello,
            on_lost=self._lost,
            on_scale=self._scale_by_itself,
        )

    def _on_loop(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return self._loop.run(call())

    def _instance_ids(self) -> list[str]:
        names = ray.util.list_named_actors(all_namespaces=True)
        found = [
            entry["name"].removeprefix(INSTANCE_PREFIX)
            for entry in names
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(INSTANCE_PREFIX)
        ]
        return sorted(found, key=lambda name: (len(name), name))

    def _scale_by_itself(self, instances: int) -> None:
        task = asyncio.create_task(self._scale_and_note(instances), name="scale")
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    async def _scale_and_note(self, instances: int) -> None:
        """``instances`` are to serve; those that an operator empties come on top."""
        rows = self._server.instances()
        draining = {row.instance_id for row in rows if row.state is InstanceState.DRAINING}
        wanted = instances + len(draining - self._leaving)
        outcome = await self._scale(min(wanted, self._config.cluster.instances_max))
        if isinstance(outcome, Refusal):
            self._server.note("scaling_failed", outcome.reason)

    async def _scale(self, instances: int) -> ClusterSummary | Refusal:
        """Drains are not under the lock: an order that comes while they last takes instances back."""
        async with self._scaling:
            present = await asyncio.to_thread(self._instance_ids)
            staying = [instance_id for instance_id in present if instance_id not in self._leaving]
            for instance_id in sorted(self._leaving, key=self._load_of, reverse=True):
                if len(staying) < instances:
                    self._leaving.discard(instance_id)
                    self._server.set_draining(instance_id, False)
                    staying.append(instance_id)
            free_ids = (f"i{n}" for n in range(instances + len(present)) if f"i{n}" not in present)
            started = [next(free_ids) for _ in range(instances - len(staying))]
            errors = await asyncio.gather(*(self._start_instance(instance_id) for instance_id in started))
            failed = [error for error in errors if error]
            if failed:
                return Refusal(failed[0])
            surplus = sorted(staying, key=self._load_of)[: max(0, len(staying) - instances)]
            self._leaving.update(surplus)
        refusals = await asyncio.gather(*(self._retire(instance_id) for instance_id in surplus))
        return next(filter(None, refusals), self._server.summary())

    def _load_of(self, instance_id: str) -> tuple[int, str]:
        """Fewest requests first."""
        rows = (row for row in self._server.instances() if row.instance_id == instance_id)
        return next((row.running + row.waiting for row in rows), 0), instance_id

    async def _start_instance(self, instance_id: str) -> str:
        """Start one and wait until it serves. Returns the reason in one line if it cannot."""
        needs_gpu = self._config.engine.kind != "simulated" and self._config.engine.device != "cpu"
        actor = RemoteInstance.options(
            name=actor_name(instance_id),
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=CPU_SHARE,
            num_gpus=1 if needs_gpu and ray.cluster_resources().get("GPU", 0) else 0,
            scheduling_strategy="SPREAD",
            max_restarts=-1,
            max_concurrency=8,
        ).remote(self._config, instance_id, self._server.address)
        try:
            await actor.process.remote()
        except RayActorError as error:
            reason = last_line(error)
            self._server.note("start_failed", f"{instance_id} did not start: {reason}", instance=instance_id)
            return f"instance {instance_id} did not start: {reason}"
        while not any(row.instance_id == instance_id for row in self._server.instances()):
            await asyncio.sleep(EMPTY_POLL_S)
        return ""

    async def _retire(self, instance_id: str) -> Refusal | None:
        """Drain by migration, wait until empty, stop; unless it is taken back meanwhile."""
        outcome = self._server.set_draining(instance_id, True)
        if isinstance(outcome, Refusal):
            self._leaving.discard(instance_id)
            return outcome
        give_up_at = time.monotonic() + EMPTY_TIMEOUT_S
        while instance_id in self._leaving:
            row = next((row for row in self._server.instances() if row.instance_id == instance_id), None)
            if row is None or row.state is InstanceState.DOWN or row.running + row.waiting == 0:
                await self._stop_emptied(instance_id)
                return None
            if time.monotonic() > give_up_at:
                self._leaving.discard(instance_id)
                self._server.set_draining(instance_id, False)
                return Refusal(f"{instance_id} was not empty after {EMPTY_TIMEOUT_S:.0f} s and serves again")
            await asyncio.sleep(EMPTY_POLL_S)
        return None

    async def _stop_emptied(self, instance_id: str) -> None:
        """Nobody can take it back any more: the lock is held until it is gone."""
        async with self._scaling:
            if instance_id not in self._leaving:
                return
            self._leaving.discard(instance_id)
            await asyncio.to_thread(self._stop_instance, instance_id)
            hello = self._hellos.pop(instance_id, None)
            if hello is not None:
                self._server.instance_retired(instance_id, hello.incarnation)
            self._server.note("stopped", f"{instance_id} was emptied and stopped", instance=instance_id)

    def _stop_instance(self, instance_id: str) -> None:
        try:
            actor = find_instance(instance_id)
            ray.wait([actor.stop.remote()], timeout=STOP_TIMEOUT_S)
            ray.kill(actor)
        except (ValueError, RayActorError):
            pass  # it is gone already

    # Which processes are alive.

    def _hello(self, hello: InstanceHello) -> None:
        known = self._hellos.get(hello.instance_id)
        if known is not None and known.incarnation == hello.incarnation:
            return
        self._hellos[hello.instance_id] = hello
        task = asyncio.create_task(self._watch(hello), name=f"watch-{hello.instance_id}")
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    def _lost(self, address: str) -> None:
        """A broken connection is only a hint; a missing process id on this host is proof."""
        for hello in list(self._hellos.values()):
            if hello.address == address and self._process_gone(hello):
                self._server.instance_ended(hello.instance_id, hello.incarnation)

    async def _watch(self, hello: InstanceHello) -> None:
        """Wait for the end of one process, then say so. A call that fails because the actor is only
        unavailable proves nothing: then ask the operating system, or Ray again once it has an answer."""
        ended = False
        while not ended:
            try:
                actor = await asyncio.to_thread(find_instance, hello.instance_id)
                now_there: ProcessName = await actor.watch.remote(hello.incarnation)
                ended = now_there.incarnation != hello.incarnation
            except (ActorDiedError, ValueError):
                ended = True
            except RayActorError:
                ended = self._process_gone(hello)
                await asyncio.sleep(FENCE_POLL_S)
        self._server.instance_ended(hello.instance_id, hello.incarnation)

    def _process_gone(self, hello: InstanceHello) -> bool:
        return hello.kv_endpoint.host == self._host and process_gone(hello.kv_endpoint.pid)


def process_gone(pid: int) -> bool:
    """Whether no such process lives on this host. A zombie will not run again: it counts as gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return Path("/proc/self").exists()  # without /proc nothing is proven
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")


def last_line(error: Exception) -> str:
    """The reason at the end of a Ray error's traceback, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split(": ", 1)[-1] if lines else type(error).__name__


RemoteManager = ray.remote(ManagerActor)
