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

CALL_TIMEOUT_S = 900.0  # scaling down waits for running requests to leave


class RayAdmin:
    """Each method is one call of the actor's method of that name. Raises ManagerAway while it is
    restarting."""

    def __init__(self, manager: ActorHandle) -> None:
        self._manager = manager

    async def status(self) -> ClusterSummary:
        return await self._call("status")  # type: ignore[no-any-return]

    async def instances(self) -> tuple[InstanceRow, ...]:
        return await self._call("instances")  # type: ignore[no-any-return]

    async def requests(self) -> tuple[RequestRow, ...]:
        return await self._call("requests")  # type: ignore[no-any-return]

    async def migrate(self, request_id: str, target_id: str) -> MigrationResult | Refusal:
        return await self._call("migrate", request_id, target_id)  # type: ignore[no-any-return]

    async def drain(self, instance_id: str) -> InstanceRow | Refusal:
        return await self._call("drain", instance_id)  # type: ignore[no-any-return]

    async def resume(self, instance_id: str) -> InstanceRow | Refusal:
        return await self._call("resume", instance_id)  # type: ignore[no-any-return]

    async def set_role(self, instance_id: str, role: InstanceRole) -> InstanceRow | Refusal:
        return await self._call("set_role", instance_id, role)  # type: ignore[no-any-return]

    async def scale(self, instances: int) -> ClusterSummary | Refusal:
        return await self._call("scale", instances)  # type: ignore[no-any-return]

    async def events(self, after: int, limit: int) -> tuple[Event, ...]:
        return await self._call("events", after, limit)  # type: ignore[no-any-return]

    async def policies(self) -> PolicyState:
        return await self._call("policies")  # type: ignore[no-any-return]

    async def set_policy(self, kind: str, name: str, settings: dict[str, str]) -> PolicyState | Refusal:
        return await self._call("set_policy", kind, name, settings)  # type: ignore[no-any-return]

    async def explain(self, request_id: str) -> tuple[DecisionRow, ...] | Refusal:
        return await self._call("explain", request_id)  # type: ignore[no-any-return]

    async def _call(self, method: str, *arguments: object) -> Any:
        answer = getattr(self._manager, method).remote(*arguments).future()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(answer), CALL_TIMEOUT_S)
        except (RayActorError, TimeoutError) as error:
            raise ManagerAway("the manager does not answer; it is being restarted") from error
