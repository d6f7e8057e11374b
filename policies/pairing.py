"""Which requests move where, once a rescheduling round.

Invariants: no instance is source and target in one round; a resting request is not moved; a move makes the
worse side of its pair strictly better off and leaves the target above the low mark, so with free blocks even
if its queue were served. Every such move raises the sorted vector of scores, so in a cluster where nothing
else happens rounds come to rest. Where instances have roles, those whose role suits a request are tried
before the others.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceRole, InstanceState
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.roles import suits
from llumnix.core.views import ClusterSnapshot, InstanceView, Move
from llumnix.policies.freeness import Load, headroom
from llumnix.policies.room import make_room


class NoPairing:
    """Nothing moves by itself."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        """Never a move."""
        return ()


class FreenessPairing:
    """Instances under the low mark give to those above the high mark, lowest to highest; for heads of queues
    that lack blocks room is made with those that lie idle elsewhere. Draining instances give to whoever can
    hold the request without being overloaded by it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config

    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        """The round's moves, those off draining instances first."""
        plan = _Round(self._config, cluster)
        plan.empty_draining()
        plan.balance()
        plan.gather()
        plan.make_room()
        return tuple(plan.moves)


class DrainPairing:
    """Draining instances give to whoever can hold the request without being overloaded by it; nothing else
    moves."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config

    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        """The round's moves."""
        plan = _Round(self._config, cluster)
        plan.empty_draining()
        return tuple(plan.moves)


class DefragmentPairing:
    """Beside draining, moves serve one end: the head of a queue that is too large for its instance gets its
    room, or goes where there is room. Balance is left to dispatch."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config

    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        """The round's moves, those off draining instances first."""
        plan = _Round(self._config, cluster)
        plan.empty_draining()
        plan.make_room()
        return tuple(plan.moves)


@dataclass(slots=True)
class _Side:
    """An instance in this round: its load as planned so far with that load's queue freeness, and how many
    more moves it may take part in."""

    view: InstanceView
    load: Load
    score: float
    room: int
    taken: set[str] = field(default_factory=set)

    @property
    def instance_id(self) -> str:
        return self.view.instance_id

    def freeness_of(self, load: Load) -> float:
        """Queue freeness of this instance under another load."""
        return load.queue_freeness(self.view.headroom_blocks)


# May this move be made? The source, its load after the move, the target, its load after the move.
Allowed = Callable[[_Side, Load, _Side, Load], bool]


class _Round:
    """One round's plan. Sides are made once; loads are replaced as moves are planned."""

    def __init__(self, config: SchedulerConfig, cluster: ClusterSnapshot) -> None:
        self.moves: list[Move] = []
        self._config = config
        self._cluster = cluster
        self._resting = cluster.resting
        serving = [view for view in cluster.instances if view.state is InstanceState.SERVING]
        open_views = [view for view in serving if view.instance_id not in cluster.closed]
        draining = [view for view in cluster.instances if view.state is InstanceState.DRAINING]
        self._open = open_views
        self._draining = [self._side(view, view.migrating_out) for view in draining if view.candidates]
        low = [view for view in serving if view.freeness < config.low_freeness and view.candidates]
        low.sort(key=lambda view: (view.freeness, view.instance_id))
        self._low = [self._side(_crowding(view, config), view.migrating_out) for view in low]
        self._serving = serving
        self._gave: set[str] = set()
        self._took: set[str] = set()

    @cached_property
    def _targets(self) -> list[_Side]:
        """More targets than moves are never needed; the freest are the best of them, by id where equal."""
        freest = sorted(self._open, key=attrgetter("queue_freeness"), reverse=True)  # they come by id
        return [
            self._side(view, view.migrating_in) for view in freest[: 2 * self._config.moves_per_round_max]
        ]

    def empty_draining(self) -> None:
        """Plan moves off draining instances, one from each in turn."""

        def allowed(source: _Side, after_source: Load, target: _Side, after: Load) -> bool:
            return target.freeness_of(after) > 0

        if self._draining:
            self._plan(self._draining, self._targets, allowed)

    def balance(self) -> None:
        """Plan moves from under the low mark to above the high one."""
        config = self._config

        def allowed(source: _Side, after_source: Load, target: _Side, after: Load) -> bool:
            if source.load.freeness(source.view.headroom_blocks) >= config.low_freeness:
                return False
            if target.load.freeness(target.view.headroom_blocks) <= config.high_freeness:
                return False
            worse = min(source.score, target.score)
            improves = min(source.freeness_of(after_source), target.freeness_of(after)) > worse
            return improves and target.freeness_of(after) > config.low_freeness

        if self._low:
            high = [side for side in self._targets if side.view.freeness > config.high_freeness]
            self._plan(self._low, high, allowed)

    def gather(self) -> None:
        """Plan moves of requests with an execution priority above 0 from instances where no headroom is kept
        for them to those where it is and they run better. Instances that gave or took already are left to
        the next round: what was planned for them is not known here."""

        def allowed(source: _Side, after_source: Load, target: _Side, after: Load) -> bool:
            return after.queue_freeness(0) > max(0.0, source.load.queue_freeness(0))

        clear = [
            self._side(view, view.migrating_in)
            for view in self._open
            if _headroom(view) and view.instance_id not in self._took
        ]
        if not clear:
            return
        strays = [
            self._side(view._replace(candidates=urgent), view.migrating_out)
            for view in self._serving
            if not _headroom(view)
            and view.instance_id not in self._gave
            and (urgent := _urgent_running(view))
        ]
        self._plan(strays, clear, allowed)

    def make_room(self) -> None:
        """Plan moves that let heads of queues in by blocks that lie idle elsewhere (room.py)."""
        busy = self._gave | self._took
        left = self._config.moves_per_round_max - len(self.moves)
        self.moves += make_room(self._cluster, self._config, busy, left)

    def _plan(self, sources: list[_Side], targets: list[_Side], allowed: Allowed) -> None:
        active = sources
        while active and len(self.moves) < self._config.moves_per_round_max:
            active = [source for source in active if self._give_one(source, targets, allowed)]

    def _give_one(self, source: _Side, targets: list[_Side], allowed: Allowed) -> bool:
        if (
            source.room <= 0
            or source.instance_id in self._took
            or len(self.moves) >= self._config.moves_per_round_max
        ):
            return False
        ranked = sorted(
            (side for side in targets if side.room > 0 and side.instance_id not in self._gave),
            key=lambda side: (-side.score, side.instance_id),
        )
        apart = any(side.view.role is not InstanceRole.NEUTRAL for side in ranked)
        for candidate in source.view.candidates:
            if candidate.request_id in source.taken or candidate.request_id in self._resting:
                continue
            for target in _suiting_first(ranked, candidate) if apart else ranked:
                if target.instance_id == source.instance_id or not target.view.serves(candidate.adapter):
                    continue
                if self._try(source, target, candidate, allowed):
                    return True
        return False

    def _try(self, source: _Side, target: _Side, candidate: MoveCandidate, allowed: Allowed) -> bool:
        blocks = source.load.demand(candidate)
        after_source, after = source.load.without(candidate), target.load.joined(candidate, blocks)
        if not allowed(source, after_source, target, after):
            return False
        reason = (
            f"draining {source.instance_id}"
            if source.load.draining
            else f"freeness {source.instance_id} {source.score:.1f} to "
            f"{source.freeness_of(after_source):.1f}, {target.instance_id} {target.score:.1f} to "
            f"{target.freeness_of(after):.1f}"
        )
        scores = tuple((side.instance_id, side.score) for side in (source, target))
        self.moves.append(Move(candidate.request_id, source.instance_id, target.instance_id, reason, scores))
        source.load, target.load = after_source, after
        source.score, target.score = source.freeness_of(after_source), target.freeness_of(after)
        source.taken.add(candidate.request_id)
        source.room -= 1
        target.room -= 1
        self._gave.add(source.instance_id)
        self._took.add(target.instance_id)
        return True

    def _side(self, view: InstanceView, moving: int) -> _Side:
        load = Load.of(view)
        score = load.queue_freeness(view.headroom_blocks)
        return _Side(view, load, score, self._config.moves_per_instance_max - moving)


def _headroom(view: InstanceView) -> int:
    return headroom(view.execution_priorities, view.headroom_blocks)


def _crowding(view: InstanceView, config: SchedulerConfig) -> InstanceView:
    """An instance below the low mark with what it should give away: where only headroom makes it look full,
    not those that the headroom is kept for."""
    if not _headroom(view) or Load.of(view).freeness(0) < config.low_freeness:
        return view
    normal = tuple([one for one in view.candidates if one.execution_priority <= 0])
    return view._replace(candidates=normal)


def _urgent_running(view: InstanceView) -> tuple[MoveCandidate, ...]:
    return tuple([one for one in view.candidates if one.execution_priority > 0 and not one.waiting])


def _suiting_first(sides: list[_Side], candidate: MoveCandidate) -> list[_Side]:
    """The same order within those whose role suits the request, and after them within the others."""
    return sorted(sides, key=lambda side: not suits(side.view.role, candidate.prefills))
