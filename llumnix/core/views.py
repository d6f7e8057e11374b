"""Read-only views: all that a policy may look at, and the decisions it returns.

Views are made by the control plane (control/cluster_view.py) from load reports and the in-flight ledger. They
are frozen: a policy that wants memory keeps its own. Those made for every report and placement are named
tuples, which are several times cheaper to make than frozen dataclasses. Every decision carries scores and a
reason, so that it can be explained later. Ties break by instance id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from llumnix.core.messages.control import InstanceRole, InstanceState
from llumnix.core.messages.load import MoveCandidate


class InstanceView(NamedTuple):
    """One instance as the manager believes it to be now: its last report plus what is in flight to and from
    it.

    ``used_blocks`` includes reservations. ``placed_blocks``/``placed_requests`` are placements no report has
    confirmed yet; ``arriving_blocks`` what running migrations will bring, ``leaving_blocks`` take away.
    ``freeness`` is the virtual-usage score (policies/freeness.py): higher is freer, negative is overloaded.
    ``queue_freeness`` counts all queued demand, not the queue's head alone: what a newcomer would find.
    ``headroom_blocks`` are kept free beside requests of each execution priority above 0 that runs there.
    ``reported_at`` is the manager's clock when the last report came in. ``adapters`` are the LoRA adapters it
    can serve; a request that needs another must not go there. The queue's head lacks ``head_missing_blocks``
    to be admitted (0: none), ``leaving_blocks`` not counted, has the scheduling priority ``head_priority``,
    and arrived at ``head_since`` on the manager's clock, which is ``head_arrived_at`` on the instance's.
    """

    instance_id: str
    role: InstanceRole
    state: InstanceState
    capacity_blocks: int
    used_blocks: int
    head_blocks: int
    waiting_blocks: int
    running: int
    waiting: int
    execution_priorities: tuple[tuple[int, int], ...]
    candidates: tuple[MoveCandidate, ...]
    placed_blocks: int
    placed_requests: int
    arriving_blocks: int
    leaving_blocks: int
    migrating_in: int
    migrating_out: int
    step_s: float
    reported_at: float
    freeness: float
    queue_freeness: float
    headroom_blocks: int = 0
    adapters: tuple[str, ...] = ()
    head_missing_blocks: int = 0
    head_priority: int = 0
    head_arrived_at: float = 0.0
    head_since: float = 0.0

    def serves(self, adapter: str) -> bool:
        """Whether a request with this LoRA adapter (empty: none) can run there."""
        return not adapter or adapter in self.adapters


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """All instances, ordered by id, at one moment. ``resting`` are requests that are moving or moved lately
    and must be left alone, ``closed`` instances that refused a migration lately and must not be targets,
    ``coming`` how many instances have been asked for that do not serve yet."""

    now: float
    instances: tuple[InstanceView, ...]
    resting: frozenset[str]
    closed: frozenset[str] = frozenset()
    coming: int = 0


class KeptPrefix(NamedTuple):
    """An instance that may take a request and is likely to keep the KV of its first ``blocks`` blocks in host
    memory, from where it is copied instead of computed."""

    view: InstanceView
    blocks: int


class RequestView(NamedTuple):
    """A request to be placed. ``blocks`` is what its prefill needs, ``adapter`` the LoRA adapter; candidates
    serve it. ``kept`` says who has a part of that already."""

    request_id: str
    blocks: int
    prompt_tokens: int
    max_tokens: int
    scheduling_priority: int
    execution_priority: int
    tenant: str
    adapter: str = ""
    kept: tuple[KeptPrefix, ...] = ()


@dataclass(frozen=True, slots=True)
class DispatchDecision:
    """Where a request goes (None: nowhere fits), with the scores of the best candidates and the reason."""

    instance_id: str | None
    scores: tuple[tuple[str, float], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Move:
    """One migration to begin, with the reason, and how source and target scored before it."""

    request_id: str
    source_id: str
    target_id: str
    reason: str
    scores: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class EntryDecision:
    """Whether a new request goes to the decode instances (else to the others), with the scores that were
    compared and the reason."""

    decode: bool
    scores: tuple[tuple[str, float], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """How many instances more (or, negative, less) there should be than serve and are coming, with the
    reason. ``at_once``: the policy sees to its own patience; else the cool-down and every start and drain are
    waited for."""

    change: int
    reason: str
    at_once: bool = False


class PreemptionAction(StrEnum):
    """How a running request gives way: its KV is copied to host memory, or given up and computed again."""

    SWAP = "swap"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class VictimView:
    """A running request that has to give way on its instance. ``blocks`` of the device hold the KV of
    ``computed_tokens`` of its ``known_tokens``; ``dirty_blocks`` of them are not in host memory yet.
    Estimates: ``swap_out_s`` to copy those out, ``swap_in_s`` to copy all back in, ``recompute_s`` to compute
    them again (0.0: not known yet)."""

    request_id: str
    execution_priority: int
    known_tokens: int
    computed_tokens: int
    blocks: int
    dirty_blocks: int
    swap_out_s: float
    swap_in_s: float
    recompute_s: float


@dataclass(frozen=True, slots=True)
class PreemptionDecision:
    """What becomes of a victim, with what each way was estimated to cost and the reason."""

    action: PreemptionAction
    scores: tuple[tuple[str, float], ...]
    reason: str


class DispatchPolicy(Protocol):
    """Chooses an instance for a new request. ``candidates`` are those that may take it, never empty, in
    falling order of ``queue_freeness``, then by id. For an urgent request (both priorities above 0) their
    waiting requests are those that it will not overtake, and their freeness is without headroom: what this
    request would find. A policy that also has ``score(view) -> float`` gets them
    in falling order of that instead; it must depend on the view alone. The sequence is good for this call
    only, and makes views as they are looked at: a policy that reads a few is faster than one that reads
    all."""

    def place(self, request: RequestView, candidates: Sequence[InstanceView]) -> DispatchDecision: ...


class PairingPolicy(Protocol):
    """Chooses which requests move where, once a round."""

    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]: ...


class SelectionPolicy(Protocol):
    """Chooses, on an instance, which of its requests it would give away first."""

    def select(self, rows: Sequence[MoveCandidate], limit: int) -> tuple[MoveCandidate, ...]: ...


class ReliefView(NamedTuple):
    """A running request that gives way once its instance's blocks run out, in ``left_s``. Estimates: that
    costs it ``loss_s``, the wait for another request to end and then the copies or computing (0.0: not
    known); moving it takes ``copy_s`` and pauses it ``pause_s`` (0.0: no
    migration has been seen yet)."""

    candidate: MoveCandidate
    left_s: float
    loss_s: float
    copy_s: float
    pause_s: float


@dataclass(frozen=True, slots=True)
class ReliefDecision:
    """Where the request moves (None: it stays, and gives way there if need be), with what each way was
    estimated to cost and the reason."""

    instance_id: str | None
    scores: tuple[tuple[str, float], ...]
    reason: str


class ReliefPolicy(Protocol):
    """Chooses, when an instance's blocks are about to run out, whether a request leaves it first."""

    def relieve(
        self, victim: ReliefView, source: InstanceView, targets: Sequence[InstanceView]
    ) -> ReliefDecision:
        """``targets`` are the freest instances that could take it, decode instances first; maybe none."""
        ...


class RolesPolicy(Protocol):
    """Keeps prefill and decode apart where instances have roles; not asked where all are neutral."""

    def enter(self, request: RequestView, entry: InstanceView, decode: InstanceView) -> EntryDecision:
        """Where a new request is placed: ``entry`` is the first candidate that prefills (by its role or
        because it is neutral), ``decode`` the first whose role is to decode."""
        ...

    def leave(
        self, request: MoveCandidate, source: InstanceView, targets: Sequence[InstanceView]
    ) -> Move | None:
        """Where a request goes that its instance's role does not suit: one whose prefill has ended on a
        prefill instance, or one that waits at a decode instance. ``targets`` are instances that could take
        it, never empty, decode instances first, then by falling queue freeness. None: it stays for now."""
        ...


class PreemptionPolicy(Protocol):
    """Chooses, on an instance with host memory for KV, how a request gives way. If the host turns out to be
    full, it is computed again whatever was chosen."""

    def decide(self, victim: VictimView) -> PreemptionDecision: ...


class ScalingPolicy(Protocol):
    """Chooses, once a round, whether the cluster should grow or shrink."""

    def scale(self, cluster: ClusterSnapshot) -> ScalingDecision: ...
