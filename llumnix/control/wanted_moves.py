"""Requests whose instance wants them elsewhere, or whose instance's role does not suit them, until they have
moved.

An instance asks by MoveWanted; the round looks for requests that wait where they should not. Each is moved as
soon as the policy names a target and both sides have a migration to spare: at once, when a migration there
ends, or in a later round. Of one instance the oldest goes first, and the others wait for it, but not for
ever: the manager does not hear when a request ends, so a wish that nobody has room for may be of one that is
no more. After FIRST_S it only takes its turn. The rest is bounded patience: a wish is forgotten after
TRIES_MAX migrations that failed, when its instance ends, and, oldest first, beyond WANTED_MAX. Called by the
global scheduler only.
"""

from dataclasses import dataclass

from llumnix.control.cluster_view import ClusterView
from llumnix.control.effects import Logged
from llumnix.control.instance_record import InstanceRecord
from llumnix.control.policy_guard import GuardedRoles
from llumnix.control.rescheduler import Rescheduler
from llumnix.core.admin import MigrationResult
from llumnix.core.config import SchedulerConfig
from llumnix.core.effects import Send
from llumnix.core.messages.control import MigrationOutcome
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.messages.migration import MoveWanted
from llumnix.core.roles import suits
from llumnix.core.views import InstanceView
from llumnix.policies.freeness import Load

WANTED_MAX = 10_000
TRIES_MAX = 3
TRY_AGAIN_S = 0.25
TARGETS_MAX = 8
FIRST_S = 5.0
TURNS_MAX = 8  # wishes of one instance that are tried in vain at a time

Orders = list[Send | Logged]


@dataclass(slots=True)
class Wanted:
    """One request that is to leave ``source_id``, wanted at ``since``; ``tries`` migrations of it have
    failed."""

    candidate: MoveCandidate
    source_id: str
    incarnation: str
    since: float
    tries: int = 0
    not_before: float = 0.0


class WantedMoves:
    """See the module."""

    def __init__(
        self, config: SchedulerConfig, roles: GuardedRoles, cluster: ClusterView, rescheduler: Rescheduler
    ) -> None:
        self._cluster = cluster
        self._rescheduler = rescheduler
        self._wanted: dict[str, Wanted] = {}
        self._ordered: dict[str, Wanted] = {}
        self.use(config, roles)

    def __len__(self) -> int:
        return len(self._wanted)

    def use(self, config: SchedulerConfig, roles: GuardedRoles) -> None:
        """Go by these settings and this policy from now on."""
        self._config = config
        self._roles = roles

    def heard(self, message: MoveWanted, now: float) -> Orders:
        """An instance asks. One that is not known, or not in the role it thinks, is not heard."""
        record = self._cluster.get(message.instance_id)
        if record is None or record.hello.incarnation != message.incarnation:
            return []
        wanted = Wanted(message.candidate, record.instance_id, message.incarnation, now)
        self._wanted.pop(message.candidate.request_id, None)
        self._wanted[message.candidate.request_id] = wanted
        if len(self._wanted) > WANTED_MAX:
            del self._wanted[next(iter(self._wanted))]
        return self._try(wanted, now)

    def migration_ended(self, result: MigrationResult, now: float) -> Orders:
        """A migration has ended, of whomever: its request is wanted no more, or again later; others may have
        waited for its place."""
        wanted = self._ordered.pop(result.request_id, None)
        if wanted is not None and result.outcome in (MigrationOutcome.REFUSED, MigrationOutcome.ABORTED):
            wanted.tries += 1
            wanted.not_before = now + TRY_AGAIN_S * wanted.tries
            if wanted.tries < TRIES_MAX and result.request_id not in self._wanted:
                self._wanted[result.request_id] = wanted
        return self._try_all(now, result.source_id) if self._wanted else []

    def instance_ended(self, instance_id: str) -> None:
        """Its process has ended, and with it what it wanted."""
        for asked in (self._wanted, self._ordered):
            for request_id in [name for name, wanted in asked.items() if wanted.source_id == instance_id]:
                del asked[request_id]

    def round(self, now: float) -> Orders:
        """Try all that are wanted, and look for those that wait where they should not."""
        orders = self._try_all(now, "") if self._wanted else []
        for record in self._cluster.waiting_to_leave():
            for candidate in record.seen.candidates:
                if candidate.prefills and not self._rescheduler.resting(candidate.request_id, now):
                    wanted = Wanted(candidate, record.instance_id, record.hello.incarnation, now)
                    orders += self._try(wanted, now)
        return orders

    def _try_all(self, now: float, source_id: str) -> Orders:
        """Those of one instance, or of all, oldest first; of each only until none goes any more. Who has been
        first in vain for long holds up nobody, and goes behind the others."""
        orders: Orders = []
        turns: dict[str, int] = {}
        for request_id, wanted in list(self._wanted.items()):
            asked, left = wanted.source_id, turns.get(wanted.source_id, TURNS_MAX)
            if not left or now < wanted.not_before or (source_id and asked != source_id):
                continue
            tried = self._try(wanted, now)
            if tried:
                orders += tried
            elif now - wanted.since < FIRST_S or self._busy(asked):
                turns[asked] = 0
            else:
                turns[asked] = left - 1
                if request_id in self._wanted:
                    self._wanted[request_id] = self._wanted.pop(request_id)
        return orders

    def _busy(self, source_id: str) -> bool:
        """Whether it has no migration to spare."""
        return self._cluster.moves.running_out(source_id) >= self._config.moves_per_instance_max

    def _try(self, wanted: Wanted, now: float) -> Orders:
        """Order the migration, if there is a target for it now."""
        candidate, source = wanted.candidate, self._cluster.get(wanted.source_id)
        request_id = candidate.request_id
        if source is None or source.hello.incarnation != wanted.incarnation or source.down:
            self._wanted.pop(request_id, None)
            return []
        if suits(source.role, candidate.prefills):
            self._wanted.pop(request_id, None)  # the role has changed meanwhile
            return []
        if source.report is None or self._busy(source.instance_id):
            return []
        targets = self._targets(source, candidate.adapter, now)
        move = self._roles.leave(candidate, source.seen, targets, now) if targets else None
        if move is None:
            return []
        wrong = self._rescheduler.unfit(move, candidate.adapter)
        self._wanted.pop(request_id, None)
        if wrong:
            return [Logged("move_ignored", f"{request_id} not moved: {wrong}")]
        self._ordered.pop(request_id, None)
        self._ordered[request_id] = wanted
        if len(self._ordered) > WANTED_MAX:
            del self._ordered[next(iter(self._ordered))]
        blocks = Load.of(source.seen).demand(candidate)
        return self._rescheduler.order(move, blocks, now, policy=self._roles.name)[1]

    def _targets(self, source: InstanceRecord, adapter: str, now: float) -> tuple[InstanceView, ...]:
        """The freest few of the decode instances, then of the others, that may take one more migration of a
        request with this LoRA adapter (empty: none)."""
        targets: list[InstanceView] = []
        for decode in (True, False):
            first = self._cluster.candidates(0, (), decode=decode, adapter=adapter)[:TARGETS_MAX]
            able = [
                view
                for view in first
                if view.instance_id != source.instance_id
                and self._cluster.moves.running_in(view.instance_id) < self._config.moves_per_instance_max
                and not self._rescheduler.closed(view.instance_id, now)
            ]
            targets += sorted(able, key=lambda view: (-view.queue_freeness, view.instance_id))
        return tuple(targets)
