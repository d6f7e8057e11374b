"""Messages between the manager and frontends or instances."""

from dataclasses import dataclass
from enum import StrEnum

TENANTS_REPORTED_MAX = 64


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
class MoveCandidate:
    """A request its instance would give away first, by the selection policy. ``blocks`` it holds or, if it is
    ``waiting``, those that its tokens need. ``tokens`` of prompt + output are known, the last
    ``output_tokens`` of them generated. ``arrived_at`` is on the instance's own clock: compare it only with
    others of the same report. ``host_blocks`` of one that waits lie in host memory and go along.
    ``adapter``: it can only go where that LoRA adapter is served."""

    request_id: str
    blocks: int
    execution_priority: int
    waiting: bool
    tokens: int = 0
    output_tokens: int = 0
    arrived_at: float = 0.0
    host_blocks: int = 0
    adapter: str = ""

    @property
    def prefills(self) -> bool:
        """Whether it has more to compute where it goes than its next token."""
        return self.waiting and self.host_blocks < self.blocks - 1


@dataclass(frozen=True, slots=True)
class TenantService:
    """What an instance did for one tenant since its start, in weighted tokens (``served_total``), where it
    believes the tenant's virtual counter to stand, and how many of its requests it holds."""

    tenant: str
    served_total: float
    counter: float
    held: int


@dataclass(frozen=True, slots=True)
class SwapTotals:
    """Swapping on an instance since its start. ``host_*`` blocks are those of its host memory. Blocks copied
    ``out`` for requests that gave way, ``ahead`` of likely victims and ``kept`` of ended ones, and ``in``;
    ``reused_blocks`` did not have to be copied out because the host had them, ``prefix_blocks`` came from the
    host instead of being computed. ``host_full`` requests were computed again for want of host memory,
    ``errors`` copies failed. ``host_leased`` of the used blocks belong to requests whose move elsewhere is
    not decided yet, and are kept whatever comes."""

    host_capacity: int
    host_used: int
    swapped_out: int
    swapped_in: int
    out_blocks: int
    in_blocks: int
    ahead_blocks: int
    kept_blocks: int
    reused_blocks: int
    prefix_hits: int
    prefix_blocks: int
    host_full: int
    errors: int
    host_leased: int = 0


@dataclass(frozen=True, slots=True)
class Shortage:
    """An instance's free blocks last ``steps_left`` more steps of its batch. Then ``candidate`` gives way
    first, which costs it ``loss_s`` by swap or recomputation, whichever is chosen there (0.0: not known)."""

    candidate: MoveCandidate
    steps_left: int
    loss_s: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Instance to manager, pushed on change. Times in seconds, ``*_total`` count since start.

    ``used_blocks`` are owned by running requests, ``reserved_blocks`` held for incoming migrations, the rest
    of ``capacity_blocks`` is free. ``head_blocks`` is what the prefill of the queue's head needs,
    ``waiting_blocks`` what all waiting requests need. ``execution_priorities`` are (priority, running
    requests of it), ascending, ``waiting_urgent`` (requests, blocks) of those that wait with a scheduling
    priority above 0. ``accepted`` are requests taken since the previous report, so that the manager can drop
    them from its in-flight ledger. ``address`` is where a manager that has restarted can ask for the
    instance's hello. ``policy_fault``, if not empty, says what its selection policy did wrong lately.
    ``tenants`` are those it holds requests of or served lately, at most TENANTS_REPORTED_MAX.
    ``settings_revision`` is that of the SchedulerSettings it goes by, ``role`` the role it works in, ``swap``
    None without host memory, ``shortage`` there when blocks are about to run out, ``adapters`` are the LoRA
    adapters in its memory or wanted by requests it holds, sorted, ``kept_tokens_max``: of so many tokens it
    can keep the KV after their requests have ended. Reports repeat about every second while nothing changes:
    silence is how a hung instance is noticed."""

    instance_id: str
    incarnation: str
    sequence: int
    capacity_blocks: int
    used_blocks: int
    reserved_blocks: int
    head_blocks: int
    waiting_blocks: int
    running: int
    waiting: int
    migrating_in: int
    migrating_out: int
    draining: bool
    execution_priorities: tuple[tuple[int, int], ...]
    candidates: tuple[MoveCandidate, ...]
    accepted: tuple[str, ...]
    step_s: float
    tokens_total: int
    preemptions_total: int
    finished_total: int
    address: str
    policy_fault: str = ""
    tenants: tuple[TenantService, ...] = ()
    settings_revision: int = 0
    role: InstanceRole = InstanceRole.NEUTRAL
    swap: SwapTotals | None = None
    shortage: Shortage | None = None
    waiting_urgent: tuple[int, int] = (0, 0)
    adapters: tuple[str, ...] = ()
    kept_tokens_max: int = 0


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


@dataclass(frozen=True, slots=True)
class InstanceStatus:
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
    """COMMITTED: the target owns the request. REFUSED: the target or the source said no, with a reason.
    ABORTED: begun, then given up because the request ended, was preempted, or a side failed; the request
    stayed where it was unless its source died. RESUMED: commit unanswered, target fenced, source took it
    back."""

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
