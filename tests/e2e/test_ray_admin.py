"""How long administrators wait for a manager that hangs. Ray's side of it is stood in for."""

import time
from concurrent.futures import Future
from typing import Any

import pytest

from llumnix.api.backend import ManagerAway
from llumnix.runtime import ray_admin
from llumnix.runtime.ray_admin import RayAdmin, ask_manager

pytestmark = pytest.mark.e2e


class HungManager:
    """Takes every call and answers none."""

    def __getattr__(self, method: str) -> Any:
        return self

    def remote(self, *arguments: object) -> Any:
        return self

    def future(self) -> "Future[object]":
        return Future()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("status", ()),
        ("instances", ()),
        ("requests", ()),
        ("policies", ()),
        ("explain", ("r",)),
        ("events", (0, 10)),
    ],
)
async def test_a_question_to_a_manager_that_hangs_ends_soon(
    method: str, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager: Any = HungManager()
    monkeypatch.setattr(ask_manager, "__kwdefaults__", {"wait_s": 0.05})
    asked_at = time.monotonic()
    with pytest.raises(ManagerAway, match="the manager has not answered for"):
        await getattr(RayAdmin(manager), method)(*arguments)
    assert time.monotonic() - asked_at < 5


@pytest.mark.asyncio
async def test_an_order_may_last_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_admin.ORDER_TIMEOUT_S > 10 * ray_admin.QUESTION_TIMEOUT_S
    waits = []

    async def ask(manager: object, method: str, *arguments: object, wait_s: float = 0.0) -> None:
        waits.append(wait_s)

    monkeypatch.setattr(ray_admin, "ask_manager", ask)
    manager: Any = HungManager()
    admin = RayAdmin(manager)
    for order in (admin.migrate("r", "i1"), admin.drain("i1"), admin.scale(2)):
        await order
    assert waits == 3 * [ray_admin.ORDER_TIMEOUT_S]
