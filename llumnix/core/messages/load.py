"""What instances tell the manager of their load, at most every few milliseconds each.

Reports and move candidates are named tuples, several times cheaper to make than frozen dataclasses.
"""

from dataclasses import dataclass
from typing import NamedTuple

from llumnix.core.messages.control import InstanceRole

TENANTS_REPORTED_MAX = 64


class MoveCandidate(NamedTuple):
    """A request its instance would give away first, by the selection policy. ``blocks`` it holds or, if it is
    ``waiting``, those that its tokens need. ``tokens`` of prompt + output are known, the last
    ``output_tokens`` of them generated. ``arrived_at`` is on the instance's own clock: compare it only with
    others of the same report. ``host_blocks`` of one that waits lie in host memory and go along.
    ``adapter``: it can only go where that LoRA adapter is served. ``scheduling_priority`` orders queues."""

    request_id: str
    blocks: int
    execution_priority: int
    waiting: bool
    tokens: int = 0
    output_tokens: int = 0
    arrived_at: float = 0.0
    host_blocks: int = 0
    adapter: str = ""
    scheduling_priority: int = 0

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


class LoadReport(NamedTuple):
    """Instance to manager, pushed on change. Times in seconds, ``*_total`` count since start.

    ``used_blocks`` are owned by running requests, ``reserved_blocks`` held for incoming migrations, the rest
    of ``capacity_blocks`` is free. ``head_blocks`` is what the prefill of the queue's head needs,
    ``waiting_blocks`` what all waiting requests need. ``execution_priorities`` are (priority, running
    requests of it), ascending, ``waiting_urgent`` (requests, blocks) of those that wait with a scheduling
    priority above 0. ``accepted`` are requests taken since the previous report, so that the manager can drop
    them from its in-flight ledger. ``address`` is where a manager that has restarted can ask for the
    instance's hello. ``policy_fault``, if not empty, says what one of its policies did wrong lately, as
    "kind: what", or why the settings it was told cannot hold there.
    ``tenants`` are those it holds requests of or served lately, at most TENANTS_REPORTED_MAX.
    ``settings_revision`` is that of the SchedulerSettings it goes by, ``role`` the role it works in, ``swap``
    None without host memory, ``shortage`` there when blocks are about to run out, ``adapters`` are the LoRA
    adapters in its memory or wanted by requests it holds, sorted, ``kept_tokens_max``: of so many tokens it
    can keep the KV at present after their requests have ended. The queue's head lacks ``head_missing_blocks``
    to be admitted (0: none, or there is no queue), has the scheduling priority ``head_priority`` and arrived
    ``head_waited_s`` ago, at ``head_arrived_at`` on the instance's own clock. Reports repeat about every
    second while nothing changes: silence is how a hung instance is noticed."""

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
    head_missing_blocks: int = 0
    head_priority: int = 0
    head_arrived_at: float = 0.0
    head_waited_s: float = 0.0
