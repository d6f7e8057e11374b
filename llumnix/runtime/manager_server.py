"""The manager at run time: the global scheduler behind a bus, its event log, and the answers administrators
wait for.

Everything happens in one event loop; the scheduler itself is pure. Used by the Ray actor and by tests that
need no Ray. Nothing here is stored: a new process learns the cluster anew from the instances' and frontends'
messages.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from llumnix.control.effects import ScaleTo
from llumnix.control.global_scheduler import Answered, GlobalScheduler, Logged
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
from llumnix.core.effects import Send
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import InstanceHello, InstanceRole, RequestRow
from llumnix.observe.event_log import EventLog
from llumnix.runtime.bus import Bus
from llumnix.runtime.garbage import Garbage

log = logging.getLogger(__name__)

TICK_MAX_S = 0.25
EVENTS_PER_S_MAX = 100  # over a manager's whole life; bursts do not matter
QUERY_TIMEOUT_S = 60.0  # a bound above the scheduler's own


class ManagerServer:
    """Runs the global scheduler until `close`. ``on_hello`` hears of every instance that introduces itself,
    ``on_lost`` of every bus address whose connection broke, ``on_scale`` of how many instances the scaling
    policy wants. ``on_failure`` is called when it cannot go on: there would be no rounds any more."""

    def __init__(
        self,
        config: Config,
        *,
        incarnation: str,
        port: int,
        on_hello: Callable[[InstanceHello], None],
        on_lost: Callable[[str], None],
        on_scale: Callable[[int], None] | None = None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.events = EventLog(first=int(time.time()) * EVENTS_PER_S_MAX)
        self._queries: dict[str, asyncio.Future[object]] = {}
        self._garbage = Garbage(time.monotonic())
        self._on_hello = on_hello
        self._on_scale = on_scale
        self._on_failure = on_failure
        self._bus = Bus(config.cluster.bind_host, on_message=self._handle, on_lost=on_lost, port=port)
        self.address = self._bus.address
        self.core = GlobalScheduler(config.scheduler, incarnation, self.address, time.monotonic())
        self.note("manager_up", f"manager {incarnation} listens at {self.address}", incarnation=incarnation)
        self._ticker = asyncio.create_task(self._tick(), name="manager-tick")
        self._ticker.add_done_callback(self._ticker_ended)

    async def close(self) -> None:
        """Stop at once. Instances and frontends go on without a manager."""
        self._ticker.cancel()
        await asyncio.gather(self._ticker, return_exceptions=True)
        self._bus.close()
        self._garbage.close()

    def instance_ended(self, instance_id: str, incarnation: str) -> None:
        """The process is gone for certain."""
        self._perform(self.core.instance_ended(instance_id, incarnation, time.monotonic()))

    def instance_retired(self, instance_id: str, incarnation: str) -> None:
        """The process was drained in order to be stopped, and is stopped."""
        self._perform(self.core.retired(instance_id, incarnation, time.monotonic()))

    def note(self, kind: str, text: str, **fields: str | int | float | bool) -> None:
        """Put something that only the runtime knows into the event log."""
        self.events.append(time.time(), kind, text, fields)

    # What administrators ask.

    def summary(self) -> ClusterSummary:
        return self.core.summary(time.monotonic())

    def instances(self) -> tuple[InstanceRow, ...]:
        return self.core.instance_rows(time.monotonic())

    def events_after(self, sequence: int, limit: int) -> tuple[Event, ...]:
        return self.events.after(sequence)[:limit]

    async def requests(self) -> tuple[RequestRow, ...]:
        query_id, effects = self.core.ask_requests(time.monotonic())
        answer = await self._answer(query_id, effects)
        if not isinstance(answer, tuple):
            raise InvariantError(f"a request list answered by {answer!r}")
        return answer

    async def migrate(self, request_id: str, target_id: str) -> MigrationResult | Refusal:
        query_id, effects = self.core.ask_migrate(request_id, target_id, time.monotonic())
        answer = await self._answer(query_id, effects)
        if not isinstance(answer, MigrationResult | Refusal):
            raise InvariantError(f"a migration answered by {answer!r}")
        return answer

    def set_draining(self, instance_id: str, draining: bool) -> InstanceRow | Refusal:
        outcome = self.core.set_draining(instance_id, draining, time.monotonic())
        if isinstance(outcome, Refusal):
            return outcome
        self._perform(outcome)
        return next(row for row in self.instances() if row.instance_id == instance_id)

    def set_role(self, instance_id: str, role: InstanceRole) -> InstanceRow | Refusal:
        outcome = self.core.set_role(instance_id, role, time.monotonic())
        if isinstance(outcome, Refusal):
            return outcome
        self._perform(outcome)
        return next(row for row in self.instances() if row.instance_id == instance_id)

    def policies(self) -> PolicyState:
        return self.core.policies()

    def set_policy(self, kind: str, name: str, settings: dict[str, str]) -> PolicyState | Refusal:
        outcome = self.core.set_policy(kind, name, settings, time.monotonic())
        if isinstance(outcome, Refusal):
            return outcome
        self._perform(outcome)
        return self.policies()

    def explain(self, request_id: str) -> tuple[DecisionRow, ...] | Refusal:
        return self.core.explain(request_id, time.monotonic())

    # The scheduler's driver.

    def _handle(self, message: object) -> None:
        self._perform(self.core.handle(message, time.monotonic()))
        if isinstance(message, InstanceHello):
            self._on_hello(message)

    async def _tick(self) -> None:
        while True:
            now = time.monotonic()
            self._perform(self.core.tick(now))
            self._garbage.sweep(now)
            wait_s = min(TICK_MAX_S, self.core.next_deadline() - now)
            await asyncio.sleep(max(0.005, wait_s))

    def _ticker_ended(self, ticker: "asyncio.Task[None]") -> None:
        error = None if ticker.cancelled() else ticker.exception()
        if error is not None:
            log.error("the manager failed", exc_info=error)
            self._on_failure(error)

    async def _answer(self, query_id: str, effects: Sequence[object]) -> object:
        future = self._queries[query_id] = asyncio.get_running_loop().create_future()
        try:
            self._perform(effects)
            return await asyncio.wait_for(future, QUERY_TIMEOUT_S)
        finally:
            del self._queries[query_id]

    def _perform(self, effects: Sequence[object]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._bus.send(effect.address, effect.message)
            elif isinstance(effect, Logged):
                self.events.append(time.time(), effect.kind, effect.text, dict(effect.fields))
            elif isinstance(effect, ScaleTo):
                if self._on_scale is not None:
                    self._on_scale(effect.instances)
            elif isinstance(effect, Answered):
                future = self._queries.get(effect.query_id)
                if future is not None and not future.done():
                    future.set_result(effect.value)
            else:
                raise InvariantError(f"the manager cannot carry out {effect!r}")
