"""What the manager believes about every instance now: its last report, corrected by what is in flight.

State per instance:

    STARTING   said hello, no report yet                    nothing is placed there
    SERVING    reports, not draining                        placements, moves in and out
    DRAINING   the operator wants it empty                  moves out only
    SILENT     no report for ``silent_after_s``             nothing, until it reports again
    DOWN       its process has ended for certain            nothing; shown for a while, then forgotten

Reports of another incarnation, out of order or repeated are ignored. A hello with a new incarnation replaces
the old process. Each instance's frozen view is cached and made again only when something about it changed, so
that a placement costs the change of one instance. Called by the global scheduler only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from llumnix.control.ledger import MoveEntry, MoveLedger, Placement, PlacementLedger
from llumnix.control.ranking import Ranking
from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceHello, InstanceState, InstanceStatus, LoadReport
from llumnix.core.views import ClusterSnapshot, InstanceView
from llumnix.policies.freeness import Load

TOKENS_UNKNOWN = 1 << 62
DOWN_MEMORY_S = 60.0

queue_freeness: Callable[[InstanceView], float] = attrgetter("queue_freeness")


@dataclass(slots=True, eq=False)
class InstanceRecord:
    """One instance. ``draining`` is the operator's wish. ``*_blocks`` and counts below it come from the
    ledgers. ``silent`` and ``down`` are facts about its process; ``state`` follows from all of these."""

    hello: InstanceHello
    heard_at: float
    report: LoadReport | None = None
    draining: bool = False
    silent: bool = False
    down: bool = False
    placed_blocks: int = 0
    placed_requests: int = 0
    arriving_blocks: int = 0
    arriving_requests: int = 0
    leaving_blocks: int = 0
    leaving_requests: int = 0
    view: InstanceView | None = None

    @property
    def state(self) -> InstanceState:
        """See the module's table."""
        if self.down:
            return InstanceState.DOWN
        if self.silent:
            return InstanceState.SILENT
        if self.report is None:
            return InstanceState.STARTING
        return InstanceState.DRAINING if self.draining else InstanceState.SERVING

    @property
    def tokens_max(self) -> int:
        """Longest prompt + output that fits there, in tokens."""
        if self.report is None:
            return self.hello.max_model_len
        return min(self.hello.max_model_len, self.report.capacity_blocks * self.hello.kv_layout.block_size)

    def blocks(self, tokens: int) -> int:
        """KV blocks that so many tokens take there."""
        return -(-tokens // self.hello.kv_layout.block_size)


class ClusterView:
    """Records by id, the ranking of those that may take a request, and both ledgers. ``heard_any``: at least
    one instance has reported so far."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._records: dict[str, InstanceRecord] = {}
        self._ranking = Ranking(queue_freeness)
        self._tokens_max_least = TOKENS_UNKNOWN
        self.heard_any = False
        self.placements = PlacementLedger()
        self.moves = MoveLedger()

    # Lookup.

    @property
    def size(self) -> int:
        """How many records there are."""
        return len(self._records)

    def get(self, instance_id: str) -> InstanceRecord | None:
        """The record, down ones included."""
        return self._records.get(instance_id)

    def records(self) -> tuple[InstanceRecord, ...]:
        """All records, ordered by id."""
        return tuple(self._records[instance_id] for instance_id in sorted(self._records))

    def live(self) -> tuple[InstanceRecord, ...]:
        """Records of processes not known to have ended, ordered by id."""
        return tuple(record for record in self.records() if not record.down)

    def use(self, config: SchedulerConfig) -> None:
        """Go by these settings from now on."""
        self._config = config
        for record in self._records.values():
            self.refresh(record)

    def rank_by(self, score: Callable[[InstanceView], float]) -> None:
        """Order candidates by falling ``score`` from now on; until then it is ``queue_freeness``."""
        self._ranking = Ranking(score)
        for record in self._records.values():
            self.refresh(record)

    def candidates(self, tokens: int, exclude: tuple[str, ...]) -> tuple[InstanceView, ...]:
        """Instances that may take a request of so many tokens now, in order of `rank_by`'s score."""
        views = self._ranking.views
        if not exclude and tokens <= self._tokens_max_least:
            return views
        return tuple(
            view
            for view in views
            if view.instance_id not in exclude and self._records[view.instance_id].tokens_max >= tokens
        )

    def snapshot(self, now: float, resting: frozenset[str], closed: frozenset[str]) -> ClusterSnapshot:
        """What pairing sees: instances that have reported and are not down."""
        views = tuple(record.view for record in self.records() if record.view is not None and not record.down)
        return ClusterSnapshot(now, views, resting, closed)

    def statuses(self) -> tuple[InstanceStatus, ...]:
        """What frontends are told, ordered by id."""
        return tuple(
            InstanceStatus(
                record.hello.instance_id,
                record.hello.incarnation,
                record.hello.address,
                record.state,
                self.shown_freeness(record)[1],
            )
            for record in self.records()
        )

    def shown_freeness(self, record: InstanceRecord) -> tuple[float, float]:
        """Freeness and queue freeness of the real load, without a draining instance's fake request:
        finite."""
        load = _load(record, draining=False)
        if load is None:
            return 0.0, 0.0
        return load.freeness(self._config.headroom_blocks), load.queue_freeness(self._config.headroom_blocks)

    # Changes. Each keeps view and ranking in step.

    def hello(self, hello: InstanceHello, now: float) -> InstanceRecord:
        """Enter a process. One of the same id has ended before; the operator's wish outlives it."""
        old = self._records.get(hello.instance_id)
        record = InstanceRecord(hello, now, draining=old is not None and old.draining)
        self._records[hello.instance_id] = record
        self.refresh(record)
        self._measure()
        return record

    def report(self, record: InstanceRecord, report: LoadReport, now: float) -> bool:
        """Take in a report of this record's incarnation. False: older than the last one, or a repeat of
        it."""
        last = record.report
        if last is not None and report.sequence <= last.sequence:
            return False
        if last is None:
            # Only the first report speaks for the operator: later ones may still show an order on its way.
            record.draining = record.draining or report.draining
        self.heard_any = True
        record.report = report
        record.heard_at = now
        record.silent = False
        for request_id in report.accepted:
            placement = self.placements.confirm(request_id, report.instance_id)
            if placement is not None:
                _unplace(record, placement)
        for move in self.moves.settle(report.instance_id):
            _count_move(record, move, -1)
        self.refresh(record)
        if last is None or last.capacity_blocks != report.capacity_blocks:
            self._measure()
        return True

    def end(self, record: InstanceRecord, now: float) -> None:
        """Its process has ended."""
        record.down = True
        record.heard_at = now
        self._drop_ledgers(record)
        self.refresh(record)
        self._measure()

    def forget(self, record: InstanceRecord) -> None:
        """Drop a record that is down."""
        del self._records[record.hello.instance_id]

    def place(self, record: InstanceRecord, request_id: str, tokens: int, now: float) -> None:
        """A request goes there."""
        blocks = record.blocks(tokens)
        displaced = self.placements.add(Placement(request_id, record.hello.instance_id, blocks, now))
        if displaced is not None:
            self._drop_placement(displaced)
        record.placed_blocks += blocks
        record.placed_requests += 1
        self.refresh(record)

    def begin_move(self, move: MoveEntry) -> None:
        """A migration has been ordered."""
        self.moves.add(move)
        self._count_sides(move, 1)

    def end_move(self, migration_id: str, now: float, *, committed: bool) -> MoveEntry | None:
        """A migration has ended. None: it was not running."""
        move = self.moves.end(migration_id, now, linger=committed)
        if move is not None and not committed:
            self._drop_move(move)
        return move

    def expire(self, now: float) -> None:
        """Forget placements and ended migrations that no report has confirmed for too long."""
        for placement in self.placements.expire(now - self._config.placement_memory_s):
            self._drop_placement(placement)
        for move in self.moves.expire(now - self._config.placement_memory_s):
            self._drop_move(move)

    def refresh(self, record: InstanceRecord) -> None:
        """Make the record's view again after a change, and put it where it belongs in the ranking."""
        record.view = self._view(record)
        view = record.view
        if view is None or view.state is not InstanceState.SERVING or self._over_capacity(view):
            self._ranking.remove(record.hello.instance_id)
        else:
            self._ranking.put(view)

    # Inside.

    def _view(self, record: InstanceRecord) -> InstanceView | None:
        report, state = record.report, record.state
        load = _load(record, state is InstanceState.DRAINING)
        if report is None or load is None:
            return None
        return InstanceView(
            instance_id=report.instance_id,
            role=record.hello.role,
            state=state,
            capacity_blocks=report.capacity_blocks,
            used_blocks=report.used_blocks + report.reserved_blocks,
            head_blocks=report.head_blocks,
            waiting_blocks=report.waiting_blocks,
            running=report.running,
            waiting=report.waiting,
            execution_priorities=report.execution_priorities,
            candidates=report.candidates,
            placed_blocks=record.placed_blocks,
            placed_requests=record.placed_requests,
            arriving_blocks=_unreserved(record, report),
            leaving_blocks=record.leaving_blocks,
            migrating_in=max(record.arriving_requests, report.migrating_in),
            migrating_out=max(record.leaving_requests, report.migrating_out),
            step_s=report.step_s,
            reported_at=record.heard_at,
            freeness=load.freeness(self._config.headroom_blocks),
            queue_freeness=load.queue_freeness(self._config.headroom_blocks),
        )

    def _over_capacity(self, view: InstanceView) -> bool:
        queued = view.waiting_blocks + view.placed_blocks
        return queued > self._config.queue_blocks_factor * view.capacity_blocks

    def _measure(self) -> None:
        live = (record.tokens_max for record in self._records.values() if not record.down)
        self._tokens_max_least = min(live, default=TOKENS_UNKNOWN)

    def _drop_ledgers(self, record: InstanceRecord) -> None:
        instance_id = record.hello.instance_id
        self.placements.drop_instance(instance_id)
        self.moves.detach(instance_id)
        record.placed_blocks = record.placed_requests = 0
        record.arriving_blocks = record.arriving_requests = 0
        record.leaving_blocks = record.leaving_requests = 0

    def _drop_placement(self, placement: Placement) -> None:
        record = self._records.get(placement.instance_id)
        if record is not None:
            _unplace(record, placement)
            self.refresh(record)

    def _drop_move(self, move: MoveEntry) -> None:
        self._count_sides(move, -1)
        move.pending = ()

    def _count_sides(self, move: MoveEntry, sign: int) -> None:
        for side in move.pending:
            record = self._records[side]
            _count_move(record, move, sign)
            self.refresh(record)


def _unplace(record: InstanceRecord, placement: Placement) -> None:
    record.placed_blocks -= placement.blocks
    record.placed_requests -= 1


def _count_move(record: InstanceRecord, move: MoveEntry, sign: int) -> None:
    if move.source_id == record.hello.instance_id:
        record.leaving_blocks += sign * move.blocks
        record.leaving_requests += sign
    else:
        record.arriving_blocks += sign * move.blocks
        record.arriving_requests += sign


def _unreserved(record: InstanceRecord, report: LoadReport) -> int:
    """Blocks of arriving requests that the instance does not hold for them yet; the others are in its
    report."""
    return max(0, record.arriving_blocks - report.reserved_blocks)


def _load(record: InstanceRecord, draining: bool) -> Load | None:
    """The same as Load.of the record's view, which is made from it."""
    report = record.report
    if report is None:
        return None
    used = report.used_blocks + report.reserved_blocks + _unreserved(record, report) - record.leaving_blocks
    arriving = max(record.arriving_requests, report.migrating_in)
    leaving = max(record.leaving_requests, report.migrating_out)
    return Load(
        report.capacity_blocks,
        max(0, used),
        report.head_blocks,
        report.waiting_blocks,
        record.placed_blocks,
        max(0, report.running + arriving - leaving),
        report.waiting,
        record.placed_requests,
        report.execution_priorities,
        draining,
    )
