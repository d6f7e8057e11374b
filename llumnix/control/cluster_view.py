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

from llumnix.control.adapter_ranking import AdapterRanking
from llumnix.control.headroom import full_blocks, shares
from llumnix.control.instance_record import InstanceRecord
from llumnix.control.ledger import MoveEntry, MoveLedger, Placement, PlacementLedger
from llumnix.control.ranking import Candidates
from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceHello, InstanceRole, InstanceState, InstanceStatus
from llumnix.core.messages.load import LoadReport
from llumnix.core.views import ClusterSnapshot, InstanceView
from llumnix.policies.freeness import classes_above_normal

TOKENS_UNKNOWN = 1 << 62
DOWN_MEMORY_S = 60.0


class ClusterView:
    """Records by id, the ranking of those that may take a request, and both ledgers. ``heard_any``: at least
    one instance has reported so far."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._records: dict[str, InstanceRecord] = {}
        self._ordered: tuple[InstanceRecord, ...] | None = ()
        self._prioritised: dict[str, None] = {}
        self._score: Callable[[InstanceView], float] | None = None
        self._entry, self._decode = AdapterRanking(), AdapterRanking()
        self._urgent: AdapterRanking | None = None
        self._tokens_max_least = TOKENS_UNKNOWN
        self._shared = False
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
        if self._ordered is None:
            self._ordered = tuple([self._records[instance_id] for instance_id in sorted(self._records)])
        return self._ordered

    def live(self) -> tuple[InstanceRecord, ...]:
        """Records of processes not known to have ended, ordered by id."""
        return tuple([record for record in self.records() if not record.down])

    def use(self, config: SchedulerConfig) -> None:
        """Go by these settings from now on."""
        self._config = config
        for record in self._records.values():
            record.headroom_blocks = full_blocks(config, record)
            self.refresh(record)
        self.share_headroom()

    def share_headroom(self) -> None:
        """Bring headroom up to date with what the cluster can spare. While nobody runs for whom any is kept,
        it stays as it is, at first the full one of `hello`."""
        if not self._prioritised and not self._shared:
            return
        self._shared = bool(self._prioritised)
        for record, blocks in shares(self._config, self._records.values()):
            if record.headroom_blocks != blocks:
                record.headroom_blocks = blocks
                record.known_view = None
                if record.load is not None and classes_above_normal(record.load.priorities):
                    self.refresh(record)

    def rank_by(self, score: Callable[[InstanceView], float] | None) -> None:
        """Order candidates by falling ``score`` from now on; None: by ``queue_freeness``, as at first."""
        self._score = score
        self._urgent = None
        for record in self._records.values():
            self.refresh(record)

    def candidates(
        self,
        tokens: int,
        exclude: tuple[str, ...],
        *,
        decode: bool,
        urgent: bool = False,
        adapter: str = "",
    ) -> Candidates:
        """Instances whose role is to decode, or all others, that may take a request of so many tokens with
        this LoRA adapter (empty: none) now, in order of `rank_by`'s score. For an ``urgent`` request those
        others are as it would find them. Good until the next change."""
        ranking = self._ranking(decode, urgent)
        return self._fitting(ranking.serving(adapter) if adapter else ranking, tokens, exclude)

    def with_adapter_at_hand(
        self,
        candidates: Candidates,
        tokens: int,
        exclude: tuple[str, ...],
        *,
        decode: bool,
        urgent: bool,
        adapter: str,
    ) -> Candidates:
        """Those of ``candidates``, which are these arguments' and not none, that have the adapter at hand and
        whose queue freeness is at most ``adapter_share`` of the highest below that, in the same order."""
        found = self.candidates(tokens, exclude, decode=decode, adapter=adapter) if urgent else candidates
        if self._score is None:
            best = found.records[0].queue_freeness
        else:
            best = max([record.queue_freeness for record in found.records])
        least = best - self._config.adapter_share * abs(best)
        at_hand = self._ranking(decode, urgent).at_hand(adapter)
        if self._score is None and not urgent:
            near = at_hand.down_to(least)
        else:
            near = Candidates(
                [record for record in at_hand.records if record.queue_freeness >= least], at_hand.view_of
            )
        return self._fitting(near, tokens, exclude)

    def candidate(
        self, instance_id: str, tokens: int, exclude: tuple[str, ...], *, decode: bool, adapter: str = ""
    ) -> InstanceRecord | None:
        """The record of an instance, if it is among these `candidates`."""
        ranking = self._decode if decode else self._entry
        if instance_id in exclude or not ranking.has(instance_id):
            return None
        record = self._records[instance_id]
        long_enough = tokens <= self._tokens_max_least or tokens <= record.tokens_max
        return record if long_enough and record.serves(adapter) else None

    def waiting_to_leave(self) -> list[InstanceRecord]:
        """Live decode instances at which requests wait, ordered by id."""
        return [
            record
            for record in self.records()
            if record.role is InstanceRole.DECODE
            and not record.down
            and record.report is not None
            and record.report.waiting
        ]

    def snapshot(self, now: float, resting: frozenset[str], closed: frozenset[str]) -> ClusterSnapshot:
        """What pairing sees: instances that have reported and are not down."""
        views = [
            record.known_view or record.seen
            for record in self.records()
            if record.report is not None and not record.down
        ]
        return ClusterSnapshot(now, tuple(views), resting, closed)

    def statuses(self) -> tuple[InstanceStatus, ...]:
        """What frontends are told, ordered by id."""
        return tuple(
            InstanceStatus(
                record.instance_id,
                record.hello.incarnation,
                record.hello.address,
                record.state,
                record.shown_queue_freeness,
                record.role,
                0 if record.report is None else record.report.kept_tokens_max,
            )
            for record in self.records()
        )

    # Changes. Each keeps view and ranking in step.

    def hello(self, hello: InstanceHello, now: float) -> InstanceRecord:
        """Enter a process. One of the same id has ended before; the operator's wish outlives it."""
        old = self._records.get(hello.instance_id)
        record = InstanceRecord(hello, now, 0, role=hello.role)
        record.headroom_blocks = full_blocks(self._config, record)
        if old is not None:
            record.draining, record.role = old.draining, old.role
        self._records[hello.instance_id] = record
        self._ordered = None
        self.refresh(record)
        self._tokens_max_least = min(self._tokens_max_least, record.tokens_max)
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
        else:
            record.count_ends(last, report, now)
        self.heard_any = True
        record.report = report
        record.heard_at = now
        record.silent = False
        for request_id in report.accepted:
            placement = self.placements.confirm(request_id, report.instance_id)
            if placement is not None:
                record.count_placement(placement, -1)
        for move in self.moves.settle(report.instance_id):
            record.count_move(move, -1)
        self.refresh(record)
        if last is None or last.capacity_blocks != report.capacity_blocks:
            self._tokens_max_least = min(self._tokens_max_least, record.tokens_max)
        return True

    def end(self, record: InstanceRecord, now: float) -> None:
        """Its process has ended."""
        record.down = True
        record.heard_at = now
        self.placements.drop_instance(record.instance_id)
        self.moves.detach(record.instance_id)
        record.forget_ledgers()
        self.refresh(record)
        live = (one.tokens_max for one in self._records.values() if not one.down)
        self._tokens_max_least = min(live, default=TOKENS_UNKNOWN)

    def forget(self, record: InstanceRecord) -> None:
        """Drop a record that is down."""
        del self._records[record.instance_id]
        self._prioritised.pop(record.instance_id, None)
        self._ordered = None

    def place(
        self, record: InstanceRecord, request_id: str, tokens: int, now: float, adapter: str = ""
    ) -> None:
        """A request goes there."""
        placement = Placement(request_id, record.instance_id, record.blocks(tokens), now, adapter)
        displaced = self.placements.add(placement)
        if displaced is not None:
            self._drop_placement(displaced)
        record.count_placement(placement, 1)
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

    def overdue(self, now: float) -> list[InstanceRecord]:
        """Those that have just become SILENT."""
        latest = now - self._config.silent_after_s
        newly = [record for record in self.live() if not record.silent and record.heard_at < latest]
        for record in newly:
            record.silent = True
            self.refresh(record)
        return newly

    def expire(self, now: float) -> None:
        """Forget placements and ended migrations that no report has confirmed for too long."""
        for placement in self.placements.expire(now - self._config.placement_memory_s):
            self._drop_placement(placement)
        for move in self.moves.expire(now - self._config.placement_memory_s):
            self._drop_move(move)

    def refresh(self, record: InstanceRecord) -> None:
        """Bring a record up to date after a change, and put it where it belongs in the ranking."""
        record.changed()
        load, serving = record.load, record.state is InstanceState.SERVING
        urgent = load is not None and load.priorities and load.priorities[-1][0] > 0  # in rising order
        if urgent and serving:
            self._prioritised[record.instance_id] = None
        elif self._prioritised:
            self._prioritised.pop(record.instance_id, None)
        full = load is None or (
            load.queued_blocks + load.placed_blocks > self._config.queue_blocks_factor * load.capacity_blocks
        )
        if full or not serving:
            self._entry.remove(record.instance_id)
            self._decode.remove(record.instance_id)
            if self._urgent is not None:
                self._urgent.remove(record.instance_id)
            return
        ranking, other = self._entry, self._decode
        if record.role is InstanceRole.DECODE:
            ranking, other = other, ranking
        other.remove(record.instance_id)
        ranking.put(record, record.queue_freeness if self._score is None else self._score(record.seen))
        if self._urgent is not None:
            if ranking is self._entry:
                self._urgent.put(record, self._urgent_score(record))
            else:
                self._urgent.remove(record.instance_id)

    # Inside.

    def _ranking(self, decode: bool, urgent: bool) -> AdapterRanking:
        return self._decode if decode else self._urgent_ranking() if urgent else self._entry

    def _urgent_ranking(self) -> AdapterRanking:
        """Kept from the first urgent request on: a cluster without priorities does not pay for it."""
        if self._urgent is None:
            self._urgent = AdapterRanking(lambda record: record.urgent_view)
            for record in self._entry.records:
                self._urgent.put(record, self._urgent_score(record))
        return self._urgent

    def _urgent_score(self, record: InstanceRecord) -> float:
        if self._score is None:
            return record.urgent_load.queue_freeness(0)
        return self._score(record.urgent_view)

    def _fitting(self, candidates: Candidates, tokens: int, exclude: tuple[str, ...]) -> Candidates:
        """Those that are long enough and not excluded."""
        if not exclude and tokens <= self._tokens_max_least:
            return candidates
        return Candidates(
            [
                record
                for record in candidates.records
                if record.instance_id not in exclude and record.tokens_max >= tokens
            ],
            candidates.view_of,
        )

    def _drop_placement(self, placement: Placement) -> None:
        record = self._records.get(placement.instance_id)
        if record is not None:
            record.count_placement(placement, -1)
            self.refresh(record)

    def _drop_move(self, move: MoveEntry) -> None:
        self._count_sides(move, -1)
        move.pending = ()

    def _count_sides(self, move: MoveEntry, sign: int) -> None:
        for side in move.pending:
            record = self._records[side]
            record.count_move(move, sign)
            self.refresh(record)
