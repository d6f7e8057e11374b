"""Orders and questions to the manager's Ray actor, as the Admin protocol: used by the HTTP admin endpoints
and by the handle of `llumnix.connect()`."""

import asyncio
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from llumnix.api.backend import ManagerAway
from llumnix.core.admin import (
    ClusterSummary,
    DecisionRow,
    Event,
    InstanceRow,
    MigrationResult,
    PolicyState,
    Refusal,
)
from llumnix.core.messages.control import InstanceRole, RequestRow

QUESTION_TIMEOUT_S = 30.0
ORDER_TIMEOUT_S = 900.0  # scaling down waits for running requests to leave


class RayAdmin:
    """Each method is one call of the actor's method of that name. Raises ManagerAway while it is
    restarting, and if it does not answer: a question soon, an order, which may last, late."""

    def __init__(self, manager: ActorHandle) -> None:
        self._manager = manager

    async def status(self) -> ClusterSummary:
        return await self._ask("status")  # type: ignore[no-any-return]

    async def instances(self) -> tuple[InstanceRow, ...]:
        return await self._ask("instances")  # type: ignore[no-any-return]

    async def requests(self) -> tuple[RequestRow, ...]:
        return await self._ask("requests")  # type: ignore[no-any-return]

    async def migrate(self, request_id: str, target_id: str) -> MigrationResult | Refusal:
        return await self._order("migrate", request_id, target_id)  # type: ignore[no-any-return]

    async def drain(self, instance_id: str) -> InstanceRow | Refusal:
        return await self._order("drain", instance_id)  # type: ignore[no-any-return]

    async def resume(self, instance_id: str) -> InstanceRow | Refusal:
        return await self._order("resume", instance_id)  # type: ignore[no-any-return]

    async def set_role(self, instance_id: str, role: InstanceRole) -> InstanceRow | Refusal:
        return await self._order("set_role", instance_id, role)  # type: ignore[no-any-return]

    async def scale(self, instances: int) -> ClusterSummary | Refusal:
        return await self._order("scale", instances)  # type: ignore[no-any-return]

    async def events(self, after: int, limit: int) -> tuple[Event, ...]:
        return await self._ask("events", after, limit)  # type: ignore[no-any-return]

    async def policies(self) -> PolicyState:
        return await self._ask("policies")  # type: ignore[no-any-return]

    async def set_policy(self, kind: str, name: str, settings: dict[str, str]) -> PolicyState | Refusal:
        return await self._order("set_policy", kind, name, settings)  # type: ignore[no-any-return]

    async def explain(self, request_id: str) -> tuple[DecisionRow, ...] | Refusal:
        return await self._ask("explain", request_id)  # type: ignore[no-any-return]

    async def _ask(self, method: str, *arguments: object) -> Any:
        return await ask_manager(self._manager, method, *arguments)

    async def _order(self, method: str, *arguments: object) -> Any:
        return await ask_manager(self._manager, method, *arguments, wait_s=ORDER_TIMEOUT_S)


async def ask_manager(
    manager: ActorHandle, method: str, *arguments: object, wait_s: float = QUESTION_TIMEOUT_S
) -> Any:
    """One call of the actor. Raises ManagerAway if it is being restarted, or has not answered in time."""
    answer = getattr(manager, method).remote(*arguments).future()
    try:
        return await asyncio.wait_for(asyncio.wrap_future(answer), wait_s)
    except RayActorError as error:
        raise ManagerAway("the manager is being restarted") from error
    except TimeoutError as error:
        raise ManagerAway(f"the manager has not answered for {wait_s:.0f} s") from error
