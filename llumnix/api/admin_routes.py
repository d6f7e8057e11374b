"""The administrator's routes, which the command line calls: questions and orders to the manager.

A bearer token guards them whenever one is set; the server does not listen beyond loopback without one.
"""

import hmac
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse, Response

from llumnix.api.backend import Backend
from llumnix.api.errors import ApiError, refused, validation_error
from llumnix.api.openai_routes import read_body
from llumnix.core.admin import Refusal
from llumnix.core.messages.control import InstanceRole

EVENTS_MAX = 1000
ADMIN_BODY_BYTES_MAX = 64 << 10
NAME_CHARS_MAX = 256
SETTINGS_MAX = 64
SETTING_CHARS_MAX = 32_768

Name = Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)]
SettingText = Annotated[str, Field(max_length=SETTING_CHARS_MAX)]
B = TypeVar("B", bound=BaseModel)


class _Order(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class MigrateBody(_Order):
    """Move a request."""

    request_id: Name
    target_id: Name


class InstanceBody(_Order):
    """Drain or resume an instance."""

    instance_id: Name


class RoleBody(_Order):
    """Let an instance work in a role."""

    instance_id: Name
    role: Annotated[InstanceRole, Field(strict=False)]


class ScaleBody(_Order):
    """Have so many instances."""

    instances: Annotated[int, Field(ge=1)]


class PolicyBody(_Order):
    """Go by a policy and settings of the scheduler."""

    kind: Name
    name: Name
    settings: Annotated[dict[Name, SettingText], Field(max_length=SETTINGS_MAX)] = {}


class AdminRoutes:
    """Everything under /admin. One per app."""

    def __init__(self, backend: Backend, token: str) -> None:
        self._admin = backend.admin
        self._backend = backend
        self._token = token.encode()
        self.router = APIRouter(prefix="/admin", dependencies=[Depends(self.authorize)])
        for path, question in (
            ("/status", self.status),
            ("/instances", self.instances),
            ("/requests", self.requests),
            ("/events", self.events),
            ("/moves", self.moves),
            ("/policy", self.policies),
            ("/explain", self.explain),
        ):
            self.router.add_api_route(path, question, methods=["GET"])
        for path, order in (
            ("/migrate", self.migrate),
            ("/drain", self.drain),
            ("/resume", self.resume),
            ("/role", self.set_role),
            ("/scale", self.scale),
            ("/policy", self.set_policy),
        ):
            self.router.add_api_route(path, order, methods=["POST"])

    async def authorize(self, request: Request) -> None:
        """Raise 401 unless the call carries the token, if one is set."""
        if not self._token:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            raise ApiError(
                401,
                "this call needs the admin token",
                kind="authentication_error",
                code="invalid_admin_token",
            )

    async def status(self) -> Response:
        """The cluster in one line."""
        return _answer(await self._admin.status())

    async def instances(self) -> Response:
        """Every instance."""
        return _answer(await self._admin.instances())

    async def requests(self) -> Response:
        """Every request on every instance."""
        return _answer(await self._admin.requests())

    async def events(self, request: Request) -> Response:
        """Events after ``after``, oldest first, at most ``limit``."""
        after = _number(request, "after", 0, 2**63 - 1)
        return _answer(await self._admin.events(after, _number(request, "limit", 100, EVENTS_MAX)))

    async def moves(self) -> Response:
        """The latest migrations as this frontend's clients felt them."""
        return _answer(self._backend.moves)

    async def migrate(self, request: Request) -> Response:
        """Move a request; answers when it has moved or not."""
        body = await _body(request, MigrateBody)
        return _answer(await self._admin.migrate(body.request_id, body.target_id))

    async def drain(self, request: Request) -> Response:
        """Empty an instance."""
        return _answer(await self._admin.drain((await _body(request, InstanceBody)).instance_id))

    async def resume(self, request: Request) -> Response:
        """Let a drained instance take requests again."""
        return _answer(await self._admin.resume((await _body(request, InstanceBody)).instance_id))

    async def set_role(self, request: Request) -> Response:
        """Let an instance work in another role."""
        body = await _body(request, RoleBody)
        return _answer(await self._admin.set_role(body.instance_id, body.role))

    async def scale(self, request: Request) -> Response:
        """Have so many instances."""
        return _answer(await self._admin.scale((await _body(request, ScaleBody)).instances))

    async def policies(self) -> Response:
        """The policies in force."""
        return _answer(await self._admin.policies())

    async def set_policy(self, request: Request) -> Response:
        """Go by another policy or other settings."""
        body = await _body(request, PolicyBody)
        return _answer(await self._admin.set_policy(body.kind, body.name, body.settings))

    async def explain(self, request: Request) -> Response:
        """What was decided about ``request``."""
        request_id = request.query_params.get("request", "")
        if not 0 < len(request_id) <= NAME_CHARS_MAX:
            raise refused(f"request must be an id of 1 to {NAME_CHARS_MAX} characters", "request")
        return _answer(await self._admin.explain(request_id))


def _answer(result: Any) -> Response:
    """Records as JSON; a refusal as 409 with its reason."""
    if isinstance(result, Refusal):
        raise ApiError(409, result.reason, kind="refused", code="refused")
    if isinstance(result, Sequence):
        return JSONResponse({"data": [asdict(entry) for entry in result]})
    return JSONResponse(asdict(result))


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or len(text) > 20 or int(text) > most:
        raise refused(f"{name} must be a whole number within 0 and {most}", name)
    return int(text)


async def _body(request: Request, kind: type[B]) -> B:
    """An order's body. It must say that it is JSON: a web page of others can make a browser on this host send
    anything here but that."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "orders need content-type: application/json", code="not_json")
    try:
        return kind.model_validate_json(await read_body(request, ADMIN_BODY_BYTES_MAX))
    except ValidationError as error:
        raise validation_error(error) from error
