"""One instance of the small world (migration_world.py): agent, engine, and the content of every KV block, in
virtual time."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from migration_host import HostMemory

from llumnix.core.config import EngineConfig, SchedulerConfig
from llumnix.core.errors import TransportError
from llumnix.core.messages.control import InstanceHello, InstanceRole, KvEndpoint, RequestRow, RequestStatus
from llumnix.core.messages.serving import RequestSpec
from llumnix.instance.agent import Agent
from llumnix.instance.engine import MovableState
from llumnix.instance.engine_core import EngineCore
from llumnix.instance.executor import StepPlan
from llumnix.instance.model_limits import ModelLimits
from llumnix.instance.request import Request
from llumnix.instance.simulated_executor import SimulatedExecutor
from llumnix.migration.transports.base import ReadStats

if TYPE_CHECKING:
    from migration_world import World

ENGINE = EngineConfig(
    kind="simulated",
    block_size=4,
    kv_blocks=40,
    step_tokens_max=24,
    batch_max=8,
    max_model_len=120,
    simulated_step_ms=20.0,
    simulated_token_ms=0.2,
)
MANAGER_ADDRESS = "manager"
ON_HOST = "-host"

KvStamp = tuple[str, int, int]
"""Whose KV a slot holds: request, position, token."""


class CachingEngine(EngineCore):
    """One that happens to have some of the leading blocks of what comes in, and lets nobody read blocks of
    what leaves that its target has."""

    def __init__(self, node: "Node", limits: ModelLimits) -> None:
        super().__init__(limits, node.world.engine, swap=node.world.swap, host=node.host)
        self.configure(SchedulerConfig(preemption_policy="swap"))
        self._node = node
        self._coming: dict[str, RequestSpec] = {}
        self._present: dict[str, int] = {}
        self._unread: dict[str, int] = {}

    def keep_present(self, migration_id: str, spec: RequestSpec, blocks_max: int) -> int:
        chance = self._node.world.random
        present = chance.randint(0, blocks_max) if chance.random() < 0.5 else 0
        self._coming[migration_id], self._present[migration_id] = spec, present
        return present

    def reserve(self, migration_id: str, blocks: int) -> tuple[int, ...] | None:
        reserved = super().reserve(migration_id, blocks)
        if reserved is None:
            return None
        spec, present = self._coming.pop(migration_id, None), self._present.get(migration_id, 0)
        if spec is not None:
            tokens, size = spec.prompt_tokens + spec.output_tokens, ENGINE.block_size
            for place in range(present * size):
                stamp = (spec.request_id, place, tokens[place])
                self._node.kv[reserved[place // size]][place % size] = stamp
            self._node.world.present_blocks += present
        return reserved[present:]

    def begin_move(self, request_id: str, present_blocks: int = 0) -> str:
        self._unread[request_id] = present_blocks
        return ""

    def end_move(self, request_id: str) -> None:
        self._unread.pop(request_id, None)

    def movable(self, request_id: str) -> MovableState | None:
        state, unread = super().movable(request_id), self._unread.get(request_id, 0)
        if state is None or not unread:
            return state
        return replace(state, blocks=state.blocks[unread:], first_block=unread)


class Node:
    """One instance: agent, engine, simulated KV, and the loop that its engine thread would run."""

    def __init__(self, world: "World", name: str, incarnation: str) -> None:
        self.world = world
        self.address = f"{name}/{incarnation}"
        self.alive = True
        self.executor = SimulatedExecutor(world.engine)
        self.host = HostMemory(self, world.swap.host_blocks, ENGINE.block_size)
        self.engine = CachingEngine(self, ModelLimits.of(self.executor, world.engine))
        self.hello = InstanceHello(
            instance_id=name,
            incarnation=incarnation,
            address=self.address,
            role=InstanceRole.NEUTRAL,
            model="simulated",
            max_model_len=self.engine.max_model_len,
            kv_layout=self.executor.kv_layout,
            kv_endpoint=KvEndpoint("host", 1, -1, self.address, ""),
            host_endpoint=KvEndpoint("host", 1, -1, self.address + ON_HOST, ""),
        )
        self.agent = Agent(self.hello, self.engine, world.migration, 0.05, MANAGER_ADDRESS)
        self.kv: list[list[KvStamp | None]] = [
            [None] * ENGINE.block_size for _ in range(self.executor.kv_layout.blocks)
        ]
        self._inbox: list[tuple[object, float]] = []
        self._stepping = False
        self._wake_at: float | None = None
        world.carry_out(self, self.agent.start(world.now))
        self.between_steps()

    def receive(self, message: object) -> None:
        self._inbox.append((message, self.world.now))
        self.wake()

    def wake(self) -> None:
        """Something came in: act now unless a step is under way."""
        if self.alive and not self._stepping:
            self.between_steps()

    def between_steps(self) -> None:
        if not self.alive or self._stepping:
            return
        world = self.world
        inbox, self._inbox = self._inbox, []
        for message, arrived_at in inbox:
            if isinstance(message, ReadDone):
                ended = message
                effects = self.agent.read_ended(ended.migration_id, ended.stage, ended.outcome, world.now)
            else:
                effects = self.agent.handle(message, world.now, arrived_at)
            world.carry_out(self, effects)
        world.carry_out(self, self.agent.tick(world.now))
        self.engine.check()
        self.agent.check()
        self.host.check()
        hold = self.agent.hold_until(world.now) if self.engine.has_work() else None
        if hold is not None:
            self._sleep_until(hold)
        elif self.engine.has_work():
            self._begin_step()
        else:
            self._sleep_until(self.agent.next_deadline() or world.now + 1.0)

    def _sleep_until(self, when: float) -> None:
        when = max(when, self.world.now + 1e-4)
        if self._wake_at is None or not self.world.now < self._wake_at <= when:
            self._wake_at = when
            self.world.at(when, self.wake)

    def memory(self, pool_name: str) -> list[list[KvStamp | None]]:
        """The content of the pool that an endpoint names."""
        return self.host.kv if pool_name.endswith(ON_HOST) else self.kv

    def waiting_with_kv(self) -> list[RequestRow]:
        """Requests that are swapped out here, and not on the move."""
        rows = self.engine.rows(self.hello.instance_id, self.world.now)
        return [
            row
            for row in rows
            if row.status is RequestStatus.SWAPPED and not self.agent._outgoing.moving(row.request_id)
        ]

    def _begin_step(self) -> None:
        self._stepping = True
        self.engine.swapped(self.host.done())
        plan = self.engine.schedule(self.world.now)
        self.host.begin(plan.jobs)
        self.host.after(plan.wait_for, lambda: self._copied(plan))

    def _copied(self, plan: StepPlan) -> None:
        """The copies that a step waits for have ended: if badly, it is planned anew."""
        if not self.alive:
            return
        if plan.wait_for and self.engine.swapped(self.host.done()):
            self._begin_step()
            return
        for chunk in plan.chunks:
            self._compute(chunk.request, chunk.start, chunk.count, chunk.samples)
        duration = self.executor.cost_s(plan) * self.world.random.uniform(*self.world.slowness)
        self.world.at(self.world.now + duration, lambda: self._end_step(plan, duration))

    def _end_step(self, plan: StepPlan, duration: float) -> None:
        self._stepping = False
        if not self.alive:
            return
        result = self.engine.apply(plan, self.executor.execute(plan), self.world.now, duration)
        for delta in (delta for deltas in result.deltas.values() for delta in deltas):
            self.world.decoded(self, delta.request_id, delta.epoch)
        self.world.carry_out(self, self.agent.after_step(result, self.world.now))
        self.between_steps()

    def _compute(self, request: Request, start: int, count: int, samples: bool) -> None:
        size = ENGINE.block_size
        for position in range(start, start + count):
            stamp = (request.request_id, position, request.tokens[position])
            self.kv[request.blocks[position // size]][position % size] = stamp
        for position in range(start + count if samples else 0):
            found = self.kv[request.blocks[position // size]][position % size]
            assert found == (request.request_id, position, request.tokens[position]), (
                f"{self.address} decodes {request.request_id}: position {position} holds {found}"
            )


@dataclass(frozen=True)
class ReadDone:
    migration_id: str
    stage: int
    outcome: ReadStats | TransportError
