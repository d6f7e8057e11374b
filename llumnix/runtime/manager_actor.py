"""The manager's Ray actor: the orders and questions of administrators, each a method that Ray calls on a
thread of its own and that waits for the manager's event loop.

No method may be a coroutine: Ray would then run all methods on one thread, and an order that lasts (a drain)
would hold up every question and the very order that calls it off. What lasts is Fleet's, in the loop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import ray

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
from llumnix.core.messages.control import InstanceRole, RequestRow
from llumnix.runtime.fleet import Fleet
from llumnix.runtime.loop_thread import LoopThread, end_process

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ClusterDescription:
    """What a newcomer needs to join in: the configuration, the manager's bus address, and the longest prompt
    + output in tokens that every instance takes (0 before any serves)."""

    config: Config
    manager_address: str
    max_model_len: int


class ManagerActor:
    """One per cluster, named MANAGER_NAME. After a crash it comes back on the same port and finds its
    instances. A failing scheduler ends the process, so that Ray starts a clean one."""

    def __init__(self, config: Config, port: int) -> None:
        self._config = config
        self._loop = LoopThread("manager", end_process)
        self._fleet = self._on_loop(lambda: Fleet(config, port, on_failure=end_process))
        self._server = self._fleet.server

    # Orders and questions.

    def describe(self) -> ClusterDescription:
        longest = self._on_loop(self._fleet.max_model_len)
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
        return self._on_loop(lambda: self._fleet.resume(instance_id))

    def set_role(self, instance_id: str, role: InstanceRole) -> InstanceRow | Refusal:
        return self._on_loop(lambda: self._server.set_role(instance_id, role))

    def policies(self) -> PolicyState:
        return self._on_loop(self._server.policies)

    def set_policy(self, kind: str, name: str, settings: dict[str, str]) -> PolicyState | Refusal:
        return self._on_loop(lambda: self._server.set_policy(kind, name, settings))

    def explain(self, request_id: str) -> tuple[DecisionRow, ...] | Refusal:
        return self._on_loop(lambda: self._server.explain(request_id))

    def starting(self, instance_id: str) -> None:
        """Told by every process of an instance before it does anything else."""
        self._on_loop(lambda: self._fleet.starting(instance_id))

    def scale(self, instances: int) -> ClusterSummary | Refusal:
        """See Fleet. Returns when so many are there, or a later order wants otherwise."""
        return self._loop.run(self._fleet.scale(instances))

    def stop(self) -> None:
        """Stop every instance in order. The actor itself is killed right after."""
        self._loop.run(self._fleet.stop())

    def _on_loop(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return self._loop.run(call())


RemoteManager = ray.remote(ManagerActor)
