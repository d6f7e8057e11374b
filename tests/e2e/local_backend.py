"""A whole backend in one event loop: the real stream table and a real engine core on the simulated executor,
with a manager that knows one instance. What the API tests serve."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from llumnix.api.backend import FailKind, ManagerAway, ModelInfo, StreamCall, StreamFailed, TokenChunk
from llumnix.api.server import ApiServer
from llumnix.api.stream_state import Deliver, Effect, Fail
from llumnix.api.streams import StreamTable
from llumnix.core.admin import (
    ClusterSummary,
    DecisionRow,
    Event,
    InstanceRow,
    MigrationResult,
    MoveSeen,
    PolicyState,
    Refusal,
)
from llumnix.core.config import EngineConfig, FrontendConfig
from llumnix.core.effects import Send
from llumnix.core.messages.control import (
    InstanceRole,
    InstanceState,
    MigrationOutcome,
    NotPlaced,
    Place,
    Placed,
    RequestRow,
)
from llumnix.core.messages.serving import Abort, Rejected, Submit, TokenBatch
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.simulated_executor import EOS_TOKEN, VOCAB_SIZE, SimulatedExecutor

MODEL = ModelInfo("simulated", 512, "", (EOS_TOKEN,), VOCAB_SIZE)


class LocalStream:
    """A TokenStream: what has come and was not taken yet is handed over as one chunk."""

    def __init__(self, backend: "LocalBackend", request_id: str) -> None:
        self._backend = backend
        self._request_id = request_id
        self._chunks: list[TokenChunk] = []
        self._failure: StreamFailed | None = None
        self._news = asyncio.Event()

    def push(self, chunk: TokenChunk) -> None:
        self._chunks.append(chunk)
        self._news.set()

    def fail(self, failure: StreamFailed) -> None:
        self._failure = failure
        self._news.set()

    async def cancel(self) -> None:
        self._backend.cancel(self._request_id)

    async def __aiter__(self) -> AsyncIterator[TokenChunk]:
        while True:
            await self._news.wait()
            self._news.clear()
            chunks, self._chunks = self._chunks, []
            if chunks:
                tokens = tuple(token for chunk in chunks for token in chunk.tokens)
                logprobs = tuple(entry for chunk in chunks for entry in chunk.logprobs)
                yield TokenChunk(chunks[0].first_index, tokens, logprobs, chunks[-1].finish_reason)
                if chunks[-1].finish_reason is not None:
                    return
            if self._failure is not None:
                raise self._failure


@dataclass
class LocalAdmin:
    """Answers orders with fixed records; refuses what is not there; away when told."""

    backend: "LocalBackend"
    away: bool = False
    orders: list[tuple[str, ...]] = field(default_factory=list)

    def _present(self, *order: str) -> None:
        if self.away:
            raise ManagerAway("the manager is being restarted")
        if order:
            self.orders.append(order)

    async def status(self) -> ClusterSummary:
        self._present()
        return ClusterSummary("simulated", 1, 1, 0, 0, 0, 2, 0, 1, "m-1", 12.5)

    async def instances(self) -> tuple[InstanceRow, ...]:
        self._present()
        load = self.backend.engine.load()
        return (
            InstanceRow(
                instance_id="instance-0",
                incarnation="i-1",
                role=InstanceRole.NEUTRAL,
                state=InstanceState.SERVING,
                model="simulated",
                address="local",
                capacity_blocks=load.capacity_blocks,
                used_blocks=load.used_blocks,
                running=load.running,
                waiting=load.waiting,
                migrating_in=0,
                migrating_out=0,
                freeness=float(load.capacity_blocks - load.used_blocks),
                step_ms=load.step_s * 1e3,
                tokens_total=load.tokens_total,
                preemptions_total=load.preemptions_total,
                report_age_s=0.0,
                pid=0,
            ),
        )

    async def requests(self) -> tuple[RequestRow, ...]:
        self._present()
        return self.backend.engine.rows("instance-0", time.monotonic())

    async def migrate(self, request_id: str, target_id: str) -> MigrationResult | Refusal:
        self._present("migrate", request_id, target_id)
        if target_id != "instance-1":
            return Refusal(f"there is no instance {target_id}")
        return MigrationResult(
            "mig-1", request_id, "instance-0", target_id, MigrationOutcome.COMMITTED, "", 2, 4096, 0.1, 0.002
        )

    async def drain(self, instance_id: str) -> InstanceRow | Refusal:
        self._present("drain", instance_id)
        rows = {row.instance_id: row for row in await self.instances()}
        return rows.get(instance_id) or Refusal(f"there is no instance {instance_id}")

    async def resume(self, instance_id: str) -> InstanceRow | Refusal:
        self._present("resume", instance_id)
        rows = {row.instance_id: row for row in await self.instances()}
        return rows.get(instance_id) or Refusal(f"there is no instance {instance_id}")

    async def set_role(self, instance_id: str, role: InstanceRole) -> InstanceRow | Refusal:
        self._present("role", instance_id, role.value)
        rows = {row.instance_id: row for row in await self.instances()}
        if instance_id not in rows:
            return Refusal(f"there is no instance {instance_id}")
        return replace(rows[instance_id], role=role)

    async def scale(self, instances: int) -> ClusterSummary | Refusal:
        self._present("scale", str(instances))
        return await self.status() if instances <= 4 else Refusal("at most 4 instances")

    async def policies(self) -> PolicyState:
        self._present()
        return PolicyState(0, {"dispatch": "freeness"}, {"rest_s": 2.0}, {"dispatch": ("freeness", "load")})

    async def set_policy(self, kind: str, name: str, settings: dict[str, str]) -> PolicyState | Refusal:
        self._present("policy", kind, name, *settings, *settings.values())
        return await self.policies() if name == "load" else Refusal(f"{name} unknown")

    async def explain(self, request_id: str) -> tuple[DecisionRow, ...] | Refusal:
        self._present()
        if request_id != "r1":
            return Refusal(f"nothing is known of {request_id}")
        placed = DecisionRow(1.5, "placed", "", "instance-0", "freeness", "freest", (("instance-0", 8.0),), 1)
        return (placed, DecisionRow(0.5, "move committed", "instance-0", "instance-1", "", "", (), 0))

    async def events(self, after: int, limit: int) -> tuple[Event, ...]:
        self._present()
        made = [
            Event(number, 1e9 + number, "migration", f"event {number}", {"n": number}) for number in (1, 2, 3)
        ]
        return tuple(event for event in made if event.sequence > after)[:limit]


class LocalBackend:
    """Must be made in a running event loop; ``run`` computes steps until cancelled."""

    def __init__(self, engine: EngineConfig, frontend: FrontendConfig, model: ModelInfo = MODEL) -> None:
        self.model = model
        self.ready = True
        self.placing = True
        self.admin = LocalAdmin(self)
        self._executor = SimulatedExecutor(engine)
        self.engine = InProcessEngine(self._executor, engine)
        self.moves: tuple[MoveSeen, ...] = ()
        self.table = StreamTable("f0", "frontend", "manager", frontend)
        self._streams: dict[str, LocalStream] = {}
        self._step_s = engine.simulated_step_ms / 1e3

    def open(self, call: StreamCall) -> LocalStream:
        stream = self._streams[call.request_id] = LocalStream(self, call.request_id)
        self._perform(self.table.open(call, time.monotonic()))
        return stream

    def cancel(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._perform(self.table.abort(request_id, time.monotonic()))

    def fail(self, request_id: str, reason: str) -> None:
        """As if the stream table had given the request up."""
        stream = self._streams.pop(request_id)
        self._perform(self.table.abort(request_id, time.monotonic()))
        stream.fail(StreamFailed(FailKind.LOST, reason))

    async def run(self) -> None:
        while True:
            self._perform(self.table.tick(time.monotonic()))
            if self.engine.has_work():
                for deltas in self.engine.step(time.monotonic).deltas.values():
                    self._take(TokenBatch("instance-0", tuple(deltas)))
            await asyncio.sleep(self._step_s)

    def _take(self, message: object) -> None:
        self._perform(self.table.handle(message, time.monotonic()))

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._sent(effect.message)
            elif isinstance(effect, Deliver):
                stream = self._streams.get(effect.request_id)
                if stream is not None:
                    stream.push(
                        TokenChunk(effect.first_index, effect.tokens, effect.logprobs, effect.finish_reason)
                    )
                if effect.finish_reason is not None:
                    self._streams.pop(effect.request_id, None)
            elif isinstance(effect, Fail):
                self._streams.pop(effect.request_id).fail(
                    StreamFailed(effect.kind, effect.reason, effect.retry_after_s)
                )

    def _sent(self, message: object) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(message, Place):
            if self.placing:
                loop.call_soon(self._take, Placed(message.request_id, "instance-0", "local"))
            else:
                loop.call_soon(self._take, NotPlaced(message.request_id, "no room anywhere", 3.0))
        elif isinstance(message, Submit):
            spec = message.spec
            refusal = self.engine.submit(spec, time.monotonic())
            if refusal is not None:
                rejected = Rejected("instance-0", spec.request_id, spec.epoch, refusal.code, refusal.reason)
                loop.call_soon(self._take, rejected)
        elif isinstance(message, Abort):
            self.engine.abort(message.request_id, message.epoch)


@dataclass
class Served:
    """A server on a socket, in a thread of its own."""

    url: str
    backend: LocalBackend
    loop: asyncio.AbstractEventLoop


@contextmanager
def served(engine: EngineConfig, frontend: FrontendConfig, model: ModelInfo = MODEL) -> Iterator[Served]:
    """Serve on a free port until the block ends."""
    server = ApiServer(frontend, model)
    ready: list[Served] = []
    begun = threading.Event()

    async def main() -> None:
        backend = LocalBackend(engine, frontend, model)
        ready.append(Served(server.url, backend, asyncio.get_running_loop()))
        async with asyncio.TaskGroup() as group:
            running = group.create_task(backend.run())
            begun.set()
            await server.serve(backend)
            running.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    begun.wait(20)
    try:
        yield ready[0]
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
