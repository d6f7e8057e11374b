"""Messages between the manager and frontends or instances; what instances report of their load: load.py.

The status of an instance, told again every second or so, is a named tuple, cheaper to make than a frozen
dataclass.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class InstanceRole(StrEnum):
    """PREFILL: takes new requests, which leave once prefilled. DECODE: takes those. NEUTRAL does both."""

    NEUTRAL = "neutral"
    PREFILL = "prefill"
    DECODE = "decode"


class InstanceState(StrEnum):
    """STARTING: known, not serving yet. SERVING. DRAINING: takes nothing new. SILENT: reports are overdue, so
    nothing new is placed there. DOWN: its process has ended for certain."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    SILENT = "silent"
    DOWN = "down"


class RequestStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    MIGRATING = "migrating"


@dataclass(frozen=True, slots=True)
class KvEndpoint:
    """Where and how an instance's KV pool can be read. ``host`` names the machine and process-id namespace,
    ``pid``/``fd`` the process and its shared-memory file (fd -1: the pool is not in shared memory),
    ``pool_name`` the name that file must carry, ``address`` the ZeroMQ endpoint that serves blocks."""

    host: str
    pid: int
    fd: int
    pool_name: str
    address: str


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of a block-first pool: ``[blocks, layers, 2, kv_heads, block_size, head_dim]`` of ``dtype``. Two
    instances can exchange blocks byte for byte when all but ``blocks`` are equal."""

    blocks: int
    layers: int
    kv_heads: int
    block_size: int
    head_dim: int
    dtype: str

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers, keys and values."""
        item_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]
        return self.layers * 2 * self.kv_heads * self.block_size * self.head_dim * item_bytes


@dataclass(frozen=True, slots=True)
class InstanceHello:
    """Instance to manager, at start and whenever asked: who I am. ``incarnation`` differs for every process
    that ever carried ``instance_id``, so a newer one proves that the older process has ended.
    ``host_endpoint`` is where KV that is swapped out can be read; None: peers cannot read it, or there is
    none. ``adapters`` are the LoRA adapters it can serve, by name, sorted."""

    instance_id: str
    incarnation: str
    address: str
    role: InstanceRole
    model: str
    max_model_len: int
    kv_layout: KvLayout
    kv_endpoint: KvEndpoint
    host_endpoint: KvEndpoint | None = None
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HelloWanted:
    """Manager to an instance or frontend that it does not know (it has restarted): introduce yourself."""


@dataclass(frozen=True, slots=True)
class FrontendHello:
    """Frontend to manager: send me cluster views and death notices at ``address``."""

    frontend_id: str
    address: str


@dataclass(frozen=True, slots=True)
class Place:
    """Frontend to manager: where should this request go? ``exclude`` lists instances that just failed it,
    ``kept`` those likely to keep the KV of so many of its first tokens."""

    frontend_address: str
    request_id: str
    prompt_tokens: int
    max_tokens: int
    scheduling_priority: int
    execution_priority: int
    tenant: str
    exclude: tuple[str, ...] = ()
    adapter: str = ""
    kept: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Placed:
    """Manager to frontend: send ``request_id`` there."""

    request_id: str
    instance_id: str
    address: str


@dataclass(frozen=True, slots=True)
class NotPlaced:
    """Manager to frontend: no instance can take it; try again after ``retry_after_s`` (0: it never will)."""

    request_id: str
    reason: str
    retry_after_s: float


class InstanceStatus(NamedTuple):
    """One instance as a frontend needs it to place alone; ``kept_tokens_max`` as in LoadReport."""

    instance_id: str
    incarnation: str
    address: str
    state: InstanceState
    freeness: float
    role: InstanceRole = InstanceRole.NEUTRAL
    kept_tokens_max: int = 0


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """Manager to every frontend: when an instance comes, goes or drains; else every second or so."""

    sequence: int
    instances: tuple[InstanceStatus, ...]


@dataclass(frozen=True, slots=True)
class MigrateOrder:
    """Manager to source instance: move ``request_id`` to the target. ``reason`` is shown to people."""

    migration_id: str
    request_id: str
    target_id: str
    target_incarnation: str
    target_address: str
    reason: str


class MigrationOutcome(StrEnum):
    """COMMITTED: the target owns the request. REFUSED: the target said no, with a reason. ABORTED: not begun
    by the source, or given up, because the request ended, was preempted, or a side failed; the request stayed
    where it was unless its source died. RESUMED: commit unanswered, target fenced, source took it back."""

    COMMITTED = "committed"
    REFUSED = "refused"
    ABORTED = "aborted"
    RESUMED = "resumed"


@dataclass(frozen=True, slots=True)
class MigrationEnded:
    """Source to manager: how an ordered migration ended. ``pause_s`` is how long the request was in no batch
    at the source, up to the answer to its commit (0 if it never left)."""

    migration_id: str
    request_id: str
    source_id: str
    target_id: str
    outcome: MigrationOutcome
    reason: str
    stages: int
    kv_bytes: int
    duration_s: float
    pause_s: float


@dataclass(frozen=True, slots=True)
class SetDraining:
    """Manager to instance: refuse (or take again) new requests and incoming migrations."""

    draining: bool


@dataclass(frozen=True, slots=True)
class SetRole:
    """Manager to instance: work in this role from now on. What it holds stays; the manager moves it."""

    role: InstanceRole


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """The scheduler's settings in force, as (name, text), all of them. Manager to instances when they change;
    instance to a manager that has restarted, beside its hello, so that an administrator's choice outlives the
    manager. The highest ``revision`` holds; 0 is how the cluster was started and is never sent."""

    revision: int
    values: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class TenantTotals:
    """Manager to instance, at a bounded rate: for tenants it reports, what to add to its own ``served_total``
    to get the tenant's virtual counter in the whole cluster. At most TENANTS_REPORTED_MAX."""

    offsets: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Fenced:
    """Manager to everyone: this process has ended for certain and will never speak again."""

    instance_id: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class ListRequests:
    """Manager to instance: describe every request you hold, to ``reply_address``."""

    query_id: str
    reply_address: str


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request as an administrator sees it."""

    request_id: str
    instance_id: str
    status: RequestStatus
    tenant: str
    scheduling_priority: int
    execution_priority: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    blocks: int
    preemptions: int
    age_s: float
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class RequestList:
    """Instance to manager: answer to ListRequests."""

    query_id: str
    instance_id: str
    rows: tuple[RequestRow, ...]
