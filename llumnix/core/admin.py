"""What administrators see and get back: the records behind the CLI's tables, the admin HTTP endpoints and the
handle of ``llumnix.connect()``. Plain data; ``dataclasses.asdict`` is their JSON form."""

from dataclasses import dataclass, field

from llumnix.core.messages.control import InstanceRole, InstanceState, MigrationOutcome
from llumnix.core.messages.load import SwapTotals


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """One instance. Blocks in blocks; ``step_ms`` is its recent mean step time; ages in seconds;
    ``pid`` of its process on its host; ``swap``: None without host memory for KV; ``adapters``: LoRA adapters
    in its memory or wanted by requests it holds; ``drained``: it is draining and holds nothing any more."""

    instance_id: str
    incarnation: str
    role: InstanceRole
    state: InstanceState
    model: str
    address: str
    capacity_blocks: int
    used_blocks: int
    running: int
    waiting: int
    migrating_in: int
    migrating_out: int
    freeness: float
    step_ms: float
    tokens_total: int
    preemptions_total: int
    report_age_s: float
    pid: int
    swap: SwapTotals | None = None
    adapters: tuple[str, ...] = ()
    drained: bool = False


@dataclass(frozen=True, slots=True)
class ClusterSummary:
    """The cluster in one line. ``manager_starts`` counts how often the manager's process has begun."""

    model: str
    instances: int
    serving: int
    running: int
    waiting: int
    migrations_running: int
    migrations_committed: int
    migrations_failed: int
    frontends: int
    manager_incarnation: str
    uptime_s: float


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """How one ordered migration ended; fields as in the MigrationEnded message."""

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
class MoveSeen:
    """One migration as a client felt it: ``gap_ms`` between the last tokens from the source and the first
    from the target, ``usual_ms`` the request's mean time between tokens until then. Their difference is the
    downtime."""

    request_id: str
    source_id: str
    target_id: str
    gap_ms: float
    usual_ms: float


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened in the cluster. ``sequence`` rises by one; ``at_s`` is seconds since the
    epoch."""

    sequence: int
    at_s: float
    kind: str
    text: str
    fields: dict[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DecisionRow:
    """One decision about a request. ``kind``: placed, not placed, move ordered, or how a move ended.
    ``source_id`` and ``policy`` are empty where there is none. ``scores`` are those of the best of
    ``candidates`` instances, in the policy's own measure: higher is better."""

    age_s: float
    kind: str
    source_id: str
    instance_id: str
    policy: str
    reason: str
    scores: tuple[tuple[str, float], ...]
    candidates: int


@dataclass(frozen=True, slots=True)
class PolicyState:
    """The policies in force, by kind, with every other setting of the scheduler and the names each kind
    knows. ``revision`` counts the changes since the cluster was started."""

    revision: int
    policies: dict[str, str]
    settings: dict[str, str | int | float | bool]
    known: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An administrator's order that was not carried out, and why. Nothing was changed."""

    reason: str
