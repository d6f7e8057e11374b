"""What the manager knows of one instance, and the view that policies get of it.

A record changes with every report of its instance and every placement there. Its load, which orders it among
the others, is made anew each time; its view, several times dearer, when somebody looks at it next. Called by
the cluster view and, to read, by the rest of the global scheduler.
"""

from collections import Counter
from dataclasses import dataclass, field

from llumnix.control.ledger import MoveEntry, Placement
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import InstanceHello, InstanceRole, InstanceState
from llumnix.core.messages.load import LoadReport
from llumnix.core.views import InstanceView
from llumnix.policies.freeness import Load

MEAN_WEIGHT = 0.1


@dataclass(slots=True, eq=False)
class InstanceRecord:
    """One instance. ``headroom_blocks`` are kept beside each execution priority above 0 (headroom.py),
    ``draining`` and ``role`` what the operator wants of it. ``end_gap_s`` is the mean time between two
    ends of requests there while it works (0.0: none has ended yet), ``ended_at`` when it last began to
    count. ``*_blocks`` and counts below it come from the ledgers. ``silent`` and ``down`` are facts
    about its process. ``state``, ``load`` and its ``queue_freeness`` follow from all of these: after a
    change to any of them, `changed` must be called. ``known_view`` is the view, if it has been made
    since. ``adapters`` are the LoRA adapters it serves, ``block_size`` the tokens in a KV block."""

    hello: InstanceHello
    heard_at: float
    headroom_blocks: int
    report: LoadReport | None = None
    role: InstanceRole = InstanceRole.NEUTRAL
    draining: bool = False
    silent: bool = False
    down: bool = False
    placed_blocks: int = 0
    placed_requests: int = 0
    arriving_blocks: int = 0
    arriving_requests: int = 0
    leaving_blocks: int = 0
    leaving_requests: int = 0
    placed_adapters: Counter[str] = field(default_factory=Counter)
    ended_at: float = 0.0
    end_gap_s: float = 0.0
    instance_id: str = field(init=False)
    adapters: frozenset[str] = field(init=False)
    block_size: int = field(init=False)
    state: InstanceState = field(init=False)
    load: Load | None = field(init=False)
    queue_freeness: float = field(init=False)
    known_view: InstanceView | None = field(init=False)

    def __post_init__(self) -> None:
        self.instance_id = self.hello.instance_id
        self.adapters = frozenset(self.hello.adapters)
        self.block_size = self.hello.kv_layout.block_size
        self.changed()

    def changed(self) -> None:
        """Bring state and load up to date, and forget the view."""
        self.known_view = None
        report = self.report
        if self.down:
            self.state = InstanceState.DOWN
        elif self.silent:
            self.state = InstanceState.SILENT
        elif report is None:
            self.state = InstanceState.STARTING
        else:
            self.state = InstanceState.DRAINING if self.draining else InstanceState.SERVING
        self.load = load = (
            None if report is None else self._load(report, self.state is InstanceState.DRAINING)
        )
        self.queue_freeness = 0.0 if load is None else load.queue_freeness(self.headroom_blocks)

    @property
    def drained(self) -> bool:
        """Whether it has heard that it is to be emptied, and nothing is there or on its way."""
        report = self.report
        if report is None or not (self.draining and report.draining):
            return False
        return not (report.running or report.waiting or report.migrating_in or report.migrating_out)

    @property
    def tokens_max(self) -> int:
        """Longest prompt + output that fits there, in tokens."""
        if self.report is None:
            return self.hello.max_model_len
        return min(self.hello.max_model_len, self.report.capacity_blocks * self.block_size)

    @property
    def view(self) -> InstanceView | None:
        """What policies see; None before the first report."""
        return None if self.report is None else self.seen

    @property
    def seen(self) -> InstanceView:
        """The view of an instance that has reported."""
        view = self.known_view
        if view is None:
            if self.report is None:
                raise InvariantError(f"{self.instance_id} is ranked without a report")
            view = self.known_view = self._make_view(self.report)
        return view

    @property
    def urgent_view(self) -> InstanceView:
        """The view that an urgent request gets: it overtakes what waits with no priority, and headroom is
        for its like."""
        view, load = self.seen, self.urgent_load
        return view._replace(
            waiting=load.waiting,
            waiting_blocks=load.queued_blocks,
            freeness=load.freeness(0),
            queue_freeness=load.queue_freeness(0),
        )

    @property
    def urgent_load(self) -> Load:
        """The load that an urgent request would find on an instance that has reported."""
        if self.load is None or self.report is None:
            raise InvariantError(f"{self.instance_id} is ranked without a report")
        waiting, blocks = self.report.waiting_urgent
        head = min(self.load.head_blocks, blocks)
        return self.load._replace(waiting=waiting, queued_blocks=blocks, head_blocks=head)

    @property
    def shown_freeness(self) -> float:
        """Freeness of the real load, without a draining instance's fake request: finite. 0 before the first
        report."""
        return 0.0 if self.load is None else self._real(self.load).freeness(self.headroom_blocks)

    @property
    def shown_queue_freeness(self) -> float:
        """Likewise, of queue freeness."""
        if self.load is None or not self.load.draining:
            return self.queue_freeness
        return self._real(self.load).queue_freeness(self.headroom_blocks)

    def count_ends(self, last: LoadReport, report: LoadReport, now: float) -> None:
        """Learn from two reports in a row how long it takes until a request ends there."""
        ended = report.finished_total - last.finished_total
        if ended > 0 and self.ended_at:
            gap_s = (now - self.ended_at) / ended
            self.end_gap_s += (MEAN_WEIGHT if self.end_gap_s else 1.0) * (gap_s - self.end_gap_s)
        if ended > 0 or not last.running or not self.ended_at:
            self.ended_at = now

    def serves(self, adapter: str) -> bool:
        """Whether requests with this LoRA adapter (empty: none) can run there."""
        return not adapter or adapter in self.adapters

    @property
    def at_hand(self) -> tuple[str, ...]:
        """Adapters of its own that it has loaded, or soon must for requests that are there or on their
        way."""
        loaded = () if self.report is None else self.report.adapters
        names = dict.fromkeys((*loaded, *self.placed_adapters))
        return tuple([adapter for adapter in names if adapter in self.adapters])

    def blocks(self, tokens: int) -> int:
        """KV blocks that so many tokens take there."""
        return -(-tokens // self.block_size)

    def count_placement(self, placement: Placement, sign: int) -> None:
        """One more (or, with -1, one less) on its way there."""
        self.placed_blocks += sign * placement.blocks
        self.placed_requests += sign
        if placement.adapter:
            self.placed_adapters[placement.adapter] += sign
            self.placed_adapters += Counter()  # drops what has come down to nothing

    def count_move(self, move: MoveEntry, sign: int) -> None:
        """One more (or less) of its requests is moving, to or from it."""
        if move.source_id == self.instance_id:
            self.leaving_blocks += sign * move.blocks
            self.leaving_requests += sign
        else:
            self.arriving_blocks += sign * move.blocks
            self.arriving_requests += sign

    def forget_ledgers(self) -> None:
        """Nothing is on its way there or from there any more."""
        self.placed_blocks = self.placed_requests = 0
        self.placed_adapters.clear()
        self.arriving_blocks = self.arriving_requests = 0
        self.leaving_blocks = self.leaving_requests = 0

    def _real(self, load: Load) -> Load:
        return load._replace(draining=False) if load.draining else load

    def _moving(self, report: LoadReport) -> tuple[int, int, int]:
        """Blocks of arriving requests that the instance does not hold for them yet, the others being in its
        report; how many requests arrive, and how many leave."""
        coming, going = self.arriving_requests, self.leaving_requests
        if not (coming or going or report.migrating_in or report.migrating_out):
            return 0, 0, 0
        unreserved = max(0, self.arriving_blocks - report.reserved_blocks)
        return unreserved, max(coming, report.migrating_in), max(going, report.migrating_out)

    def _load(self, report: LoadReport, draining: bool) -> Load:
        """The same as Load.of the view, which has these numbers."""
        used, batch = report.used_blocks + report.reserved_blocks, report.running
        unreserved, arriving, leaving = self._moving(report)
        if unreserved or arriving or leaving or self.leaving_blocks:
            used = max(0, used + unreserved - self.leaving_blocks)
            batch = max(0, batch + arriving - leaving)
        return Load(
            report.capacity_blocks,
            used,
            report.head_blocks,
            report.waiting_blocks,
            self.placed_blocks,
            batch,
            report.waiting,
            self.placed_requests,
            report.execution_priorities,
            draining,
        )

    def _make_view(self, report: LoadReport) -> InstanceView:
        assert self.load is not None
        unreserved, arriving, leaving = self._moving(report)
        return InstanceView(
            self.instance_id,
            self.role,
            self.state,
            report.capacity_blocks,
            report.used_blocks + report.reserved_blocks,
            report.head_blocks,
            report.waiting_blocks,
            report.running,
            report.waiting,
            report.execution_priorities,
            report.candidates,
            self.placed_blocks,
            self.placed_requests,
            unreserved,
            self.leaving_blocks,
            arriving,
            leaving,
            report.step_s,
            self.heard_at,
            self.load.freeness(self.headroom_blocks),
            self.queue_freeness,
            self.headroom_blocks,
            self.hello.adapters,
            report.head_missing_blocks,
            report.head_priority,
            report.head_arrived_at,
            self.heard_at - report.head_waited_s,
        )
