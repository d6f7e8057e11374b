"""The instances' lives as Ray knows them: how many there are to be, and which process has ended.

It starts and stops instance actors, and watches each one's process: only Ray and the operating system can say
that a process has ended for certain, which is what frees a migration whose commit went unanswered. The
scheduling itself is GlobalScheduler's; this class adds nothing to it.

    life        means                                        ends
    staying     present and not leaving                      an order wants fewer: leaving
    leaving     drained in order to be stopped (a task)      empty or dead: stopped; wanted again: staying;
                                                             not empty for too long: staying

An instance that leaves remembers it, so that a manager that comes back goes on where the last one stopped.
Everything happens in one event loop. Called by the manager's actor only.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayActorError

from llumnix.core.admin import ClusterSummary, InstanceRow, Refusal
from llumnix.core.config import Config
from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import InstanceHello, InstanceState
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
from llumnix.runtime.manager_server import ManagerServer
from llumnix.runtime.reservations import actor_options, give_back, reserved_ids

FENCE_POLL_S = 0.1
EMPTY_POLL_S = 0.1
EMPTY_TIMEOUT_S = 600.0
HELLO_TIMEOUT_S = 60.0  # it is the first word of a process that serves, and repeated on demand
STARTS_MAX = 3  # processes of one instance that may begin before one of them serves
RECOVERY_S = 3.0  # within it a manager that came back hears from every instance that is well


class Fleet:
    """Made in the loop that it lives in. ``server`` is the scheduler behind its bus; ``on_failure`` is
    called when that cannot go on."""

    def __init__(self, config: Config, port: int, on_failure: Callable[[BaseException], None]) -> None:
        self._config = config
        self._host = host_identity()
        self._hellos: dict[str, InstanceHello] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._scaling = asyncio.Lock()
        self._leaving: dict[str, asyncio.Task[str]] = {}
        self._asked: set[str] = set()  # who has said whether it leaves
        self._starts: dict[str, int] = {}  # processes that have begun, of instances that do not serve yet
        self._recovered_at = time.monotonic() + RECOVERY_S
        self.server = ManagerServer(
            on_this_host(config),
            incarnation=uuid.uuid4().hex[:8],
            port=port,
            on_hello=self._hello,
            on_lost=self._lost,
            on_scale=lambda instances: self._go(self._scale_by_itself(instances), "scale"),
            on_failure=on_failure,
        )
        self._go(self._give_back_unused(), "give-back")

    def max_model_len(self) -> int:
        """Longest prompt + output in tokens that every instance takes; 0 before any serves."""
        return min((hello.max_model_len for hello in self._hellos.values()), default=0)

    def resume(self, instance_id: str) -> InstanceRow | Refusal:
        """Let an instance take requests again, also one that was to be stopped once empty."""
        outcome = self.server.set_draining(instance_id, False)
        if not isinstance(outcome, Refusal):
            self._leaving.pop(instance_id, None)
        return outcome

    def starting(self, instance_id: str) -> None:
        """A process of an instance has begun. Ray begins another when it dies, without end and without a
        word."""
        if instance_id in self._starts:
            self._starts[instance_id] += 1

    async def stop(self) -> None:
        """Stop all instances, each in order, and the server. At once: one that hangs takes STOP_TIMEOUT_S."""
        present = await asyncio.to_thread(instance_ids)
        await asyncio.gather(*(asyncio.to_thread(stop_instance, instance_id) for instance_id in present))
        await self.server.close()

    # How many there are to be.

    async def scale(self, instances: int) -> ClusterSummary | Refusal:
        """Start or drain-and-stop instances until there are ``instances``; takes back those on their way out
        first. Returns when that is so, or cannot be any more because somebody took one of them back.

        Drains are not under the lock: an order that comes while they last takes instances back."""
        allowed = self._config.cluster.instances_max
        if not 1 <= instances <= allowed:
            return Refusal(f"instances must be within 1 and {allowed}, got {instances}")
        async with self._scaling:
            present = await asyncio.to_thread(instance_ids)
            await self._recover(present)
            staying = [instance_id for instance_id in present if instance_id not in self._leaving]
            for instance_id in sorted(self._leaving, key=self._worth, reverse=True):
                if len(staying) < instances and not isinstance(self.resume(instance_id), Refusal):
                    staying.append(instance_id)
            free_ids = (f"i{n}" for n in range(instances + len(present)) if f"i{n}" not in present)
            started = [next(free_ids) for _ in range(instances - len(staying))]
            errors = await asyncio.gather(*(self._start_instance(instance_id) for instance_id in started))
            failed = [error for error in errors if error]
            if failed:
                return Refusal(failed[0])
            for instance_id in sorted(staying, key=self._worth)[: max(0, len(staying) - instances)]:
                self._leave(instance_id)
            leaving = list(self._leaving.values())
        stayed = await asyncio.gather(*(asyncio.shield(task) for task in leaving))
        reason = next(filter(None, stayed), "")
        return Refusal(reason) if reason else self.server.summary()

    async def _scale_by_itself(self, instances: int) -> None:
        """``instances`` are to serve; those that an operator empties come on top."""
        draining = {row.instance_id for row in self.server.instances() if row.state is InstanceState.DRAINING}
        wanted = instances + len(draining - self._leaving.keys())
        outcome = await self.scale(min(wanted, self._config.cluster.instances_max))
        if isinstance(outcome, Refusal):
            self.server.note("scaling_failed", outcome.reason)

    def _worth(self, instance_id: str) -> tuple[bool, bool, int, str]:
        """What is lost if it goes, least first: nothing with one that is down or unheard of, then one that is
        drained anyway, then one with few requests."""
        row = self._row(instance_id)
        if row is None:
            return False, False, 0, instance_id
        state = row.state
        load = row.running + row.waiting
        return state is not InstanceState.DOWN, state is not InstanceState.DRAINING, load, instance_id

    def _row(self, instance_id: str) -> InstanceRow | None:
        return next((row for row in self.server.instances() if row.instance_id == instance_id), None)

    async def _start_instance(self, instance_id: str) -> str:
        """Start one and wait until it serves. Returns the reason in one line if it cannot; then nothing of it
        is left."""
        self._starts[instance_id] = 0
        before = self._hellos.get(instance_id)  # of an earlier process of this id
        try:
            options = await asyncio.to_thread(actor_options, self._config.engine, instance_id)
            actor = RemoteInstance.options(
                name=actor_name(instance_id),
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=8,
                **options,
            ).remote(self._config, instance_id, self.server.address)
            await self._constructed(instance_id, actor)
            await self._introduced(instance_id, before)
        except (RayActorError, ConfigurationError) as error:
            reason = last_line(error) if isinstance(error, RayActorError) else str(error)
            await asyncio.to_thread(stop_instance, instance_id, orderly=False)
            self.server.note("start_failed", f"{instance_id} did not start: {reason}", instance=instance_id)
            return f"instance {instance_id} did not start: {reason}"
        finally:
            del self._starts[instance_id]
        return ""

    async def _constructed(self, instance_id: str, actor: ActorHandle) -> None:
        """Wait until the constructor is through. Raises RayActorError if it failed, ConfigurationError if its
        process died again and again."""
        through = asyncio.wrap_future(actor.process.remote().future())
        while not through.done():
            if self._starts[instance_id] > STARTS_MAX:
                through.cancel()
                raise ConfigurationError(
                    f"its process died {STARTS_MAX} times before it served; Ray's logs on its host say more"
                )
            await asyncio.wait((through,), timeout=EMPTY_POLL_S)
        await through

    async def _introduced(self, instance_id: str, before: InstanceHello | None) -> None:
        """Wait until its process has said hello on the bus. Raises ConfigurationError if it does not."""
        give_up_at = time.monotonic() + HELLO_TIMEOUT_S
        while self._hellos.get(instance_id) is before:
            if time.monotonic() > give_up_at:
                raise ConfigurationError(
                    f"its process runs, but the manager has not heard from it for {HELLO_TIMEOUT_S:.0f} s; "
                    f"its host must be able to reach {self.server.address}"
                )
            await asyncio.sleep(EMPTY_POLL_S)

    # On the way out.

    def _leave(self, instance_id: str) -> None:
        self.server.set_draining(instance_id, True)  # refused if it is down: then it is stopped at once
        task = asyncio.create_task(self._retire(instance_id), name=f"retire-{instance_id}")
        self._leaving[instance_id] = task

    async def _retire(self, instance_id: str) -> str:
        """Wait until it is empty, and stop it. Returns why it stays if it does."""
        await asyncio.to_thread(tell_leaving, instance_id, True)
        reason = await self._stop_once_empty(instance_id)
        if reason and instance_id not in self._leaving:
            await asyncio.to_thread(tell_leaving, instance_id, False)
        return reason

    async def _stop_once_empty(self, instance_id: str) -> str:
        me = asyncio.current_task()
        give_up_at = time.monotonic() + EMPTY_TIMEOUT_S
        while self._leaving.get(instance_id) is me:
            row = self._row(instance_id)
            if row is None or row.drained or row.state is InstanceState.DOWN:
                async with self._scaling:
                    if self._leaving.get(instance_id) is me:
                        await self._stop_leaving(instance_id)
                        return ""
            elif time.monotonic() > give_up_at:
                self.resume(instance_id)
                return f"{instance_id} was not empty after {EMPTY_TIMEOUT_S:.0f} s and serves again"
            await asyncio.sleep(EMPTY_POLL_S)
        return f"called off: {instance_id} was taken back before it was empty"

    async def _stop_leaving(self, instance_id: str) -> None:
        """Nobody can take it back any more: the lock is held until it is gone."""
        row = self._row(instance_id)
        orderly = row is not None and row.state is not InstanceState.DOWN
        await asyncio.to_thread(stop_instance, instance_id, orderly=orderly)
        del self._leaving[instance_id]
        self._asked.discard(instance_id)
        hello = self._hellos.pop(instance_id, None)
        if hello is not None:
            self.server.instance_retired(instance_id, hello.incarnation)
        how = "was emptied and stopped" if orderly else "was down and is not started again"
        self.server.note("stopped", f"{instance_id} {how}", instance=instance_id)

    async def _recover(self, present: list[str]) -> None:
        """Right after the start, wait to hear who was on the way out."""
        while time.monotonic() < self._recovered_at and not self._asked.issuperset(present):
            await asyncio.sleep(EMPTY_POLL_S)

    # Which processes are alive.

    def _go(self, work: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _hello(self, hello: InstanceHello) -> None:
        known = self._hellos.get(hello.instance_id)
        if known is not None and known.incarnation == hello.incarnation:
            return
        self._hellos[hello.instance_id] = hello
        self._go(self._watch(hello), f"watch-{hello.instance_id}")

    def _lost(self, address: str) -> None:
        """A broken connection is only a hint; a missing process id on this host is proof."""
        for hello in list(self._hellos.values()):
            if hello.address == address and self._process_gone(hello):
                self.server.instance_ended(hello.instance_id, hello.incarnation)

    async def _watch(self, hello: InstanceHello) -> None:
        """Wait for the end of one process, then say so. A call that fails because the actor is only
        unavailable proves nothing: then ask the operating system, or Ray again once it has an answer."""
        ended, incarnation = False, ""  # the first call is answered at once: no process has this name
        while not ended:
            try:
                actor = await asyncio.to_thread(find_instance, hello.instance_id)
                now_there: ProcessName = await actor.watch.remote(incarnation)
                ended = now_there.incarnation != hello.incarnation
                if not (ended or incarnation):
                    incarnation = hello.incarnation
                    await self._heard_of(hello.instance_id, now_there)
            except (ActorDiedError, ValueError):
                ended = True
            except RayActorError:
                ended = self._process_gone(hello)
                await asyncio.sleep(FENCE_POLL_S)
        self.server.instance_ended(hello.instance_id, hello.incarnation)
        await self._give_back_unused()

    async def _give_back_unused(self) -> None:
        """What is reserved for instances that are gone for good. The lock: none is being started."""
        async with self._scaling:
            present = await asyncio.to_thread(instance_ids)
            for instance_id in await asyncio.to_thread(reserved_ids):
                if instance_id not in present:
                    await asyncio.to_thread(give_back, instance_id)

    async def _heard_of(self, instance_id: str, process: ProcessName) -> None:
        """A process that left when the last manager died goes on leaving; one that has come back to life
        hears again that it is to."""
        if instance_id in self._leaving:
            await asyncio.to_thread(tell_leaving, instance_id, True)
        elif process.leaving:
            self._leave(instance_id)
            self.server.note("scaling", f"{instance_id} goes on being emptied", instance=instance_id)
        self._asked.add(instance_id)

    def _process_gone(self, hello: InstanceHello) -> bool:
        return hello.kv_endpoint.host == self._host and process_gone(hello.kv_endpoint.pid)


def instance_ids() -> list[str]:
    """Every instance that Ray keeps, by number."""
    names = ray.util.list_named_actors(all_namespaces=True)
    found = [
        entry["name"].removeprefix(INSTANCE_PREFIX)
        for entry in names
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(INSTANCE_PREFIX)
    ]
    return sorted(found, key=lambda name: (len(name), name))


def tell_leaving(instance_id: str, leaving: bool) -> None:
    """Let an instance remember whether it is on the way out. Not waited for: a process that dies meanwhile is
    told again."""
    try:
        find_instance(instance_id).leave.remote(leaving)
    except ValueError:
        pass  # it is gone already


def stop_instance(instance_id: str, *, orderly: bool = True) -> None:
    """End an instance for good; ``orderly``: its process lives and leaves the bus first."""
    try:
        actor = find_instance(instance_id)
        if orderly:
            ray.wait([actor.stop.remote()], timeout=STOP_TIMEOUT_S)
        ray.kill(actor)
    except (ValueError, RayActorError):
        pass  # it is gone already
    give_back(instance_id)


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
