"""Small engines and messages that tests of one side of a migration, or of the agent, need."""

from collections.abc import Sequence

from engine_driving import small_engine, spec

from llumnix.core.config import MigrationConfig
from llumnix.core.effects import Send
from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.messages.control import InstanceHello, InstanceRole, KvEndpoint, MigrateOrder
from llumnix.core.messages.migration import Commit, CopyStage, Reserve
from llumnix.core.messages.serving import RequestSpec
from llumnix.instance.agent import Agent
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.migration.pace import CopySpeeds, Pace
from llumnix.migration.source import SourceMigration
from llumnix.migration.transports.base import ReadStats

MANAGER = "tcp://manager:1"
SOURCE, TARGET = "tcp://source:1", "tcp://target:1"
CONFIG = MigrationConfig(answer_timeout_s=5.0, reservation_s=15.0, incoming_max=2, outgoing_max=2)
READ = ReadStats(kv_bytes=64, copies=1, duration_s=0.25, copying_s=0.25)
STEP_S = 0.02


def hello(name: str, engine: InProcessEngine) -> InstanceHello:
    """Who the instance ``name`` is; its incarnation is ``name``-1."""
    return InstanceHello(
        instance_id=name,
        incarnation=f"{name}-1",
        address=f"tcp://{name}:1",
        role=InstanceRole.NEUTRAL,
        model="simulated",
        max_model_len=engine.max_model_len,
        kv_layout=engine.executor.kv_layout,
        kv_endpoint=KvEndpoint("host", 1, -1, f"pool-of-{name}", ""),
        host_endpoint=KvEndpoint("host", 1, -1, f"pool-of-{name}-host", ""),
    )


def agent(name: str, engine: InProcessEngine, config: MigrationConfig = CONFIG) -> Agent:
    """An agent that reports at most every 10 ms."""
    return Agent(hello(name, engine), engine, config, 0.01, MANAGER)


def pace() -> Pace:
    """Steps of STEP_S."""
    steady = Pace()
    steady.note((STEP_S, STEP_S))
    return steady


def order(request_id: str = "r", migration_id: str = "m") -> MigrateOrder:
    """Move a request to the instance called target."""
    return MigrateOrder(migration_id, request_id, "target", "target-1", TARGET, "rebalance")


def reserve(
    request: RequestSpec, blocks: int, *, migration_id: str = "m", engine: InProcessEngine | None = None
) -> Reserve:
    """What the instance called source asks of the one called target."""
    source = hello("source", engine or small_engine())
    return Reserve(
        migration_id=migration_id,
        source_id="source",
        source_incarnation="source-1",
        source_address=SOURCE,
        target_incarnation="target-1",
        kv_endpoint=source.kv_endpoint,
        kv_layout=source.kv_layout,
        spec=request,
        blocks=blocks,
    )


def commit(blocks: tuple[int, ...], computed: int, output: tuple[int, ...], first_index: int = 0) -> Commit:
    """The commit of a request that was at its first epoch."""
    return Commit("m", FIRST_EPOCH + 1, blocks, computed, first_index, output, 0.5)


def stage(number: int, blocks: tuple[int, ...], reserve_blocks: int) -> CopyStage:
    return CopyStage("m", number, blocks, reserve_blocks)


def running(engine: InProcessEngine, *, prompt_len: int, steps: int, max_tokens: int = 30) -> RequestSpec:
    """A request ``r`` that has run for some steps."""
    request = spec("r", prompt_len=prompt_len, max_tokens=max_tokens)
    assert engine.submit(request, 0.0) is None
    for _ in range(steps):
        engine.step(lambda: 0.0)
    return request


def messages(effects: Sequence[object], kind: type | None = None) -> list[object]:
    """What is sent, all of it or of one class."""
    sent = [effect.message for effect in effects if isinstance(effect, Send)]
    return [message for message in sent if kind is None or isinstance(message, kind)]


def sent_to(effects: Sequence[object], address: str) -> list[object]:
    """What is sent to one address."""
    return [e.message for e in effects if isinstance(e, Send) and e.address == address]


def begun(engine: InProcessEngine, config: MigrationConfig = CONFIG) -> tuple[SourceMigration, list[Send]]:
    """The source's side of `order`, and what it says first."""
    migration = SourceMigration(
        order(),
        hello("source", engine),
        engine=engine,
        config=config,
        pace=pace(),
        speeds=CopySpeeds(),
        manager_address=MANAGER,
    )
    return migration, migration.begin(1.0)
