"""Policies as they run: other people's code, whose faults end here.

A policy that raises, or returns what is no decision, is overruled by the default of its kind for that one
decision, and that is told: at once, then at most once a minute for the same policy, with the number of times.
Nothing it returns is used unchecked. Called by the placer, the rescheduler and the scaler.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from sys import float_info
from typing import TypeVar

from llumnix.control.effects import Logged
from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceState
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.views import (
    ClusterSnapshot,
    DispatchDecision,
    EntryDecision,
    InstanceView,
    Move,
    ReliefDecision,
    ReliefView,
    RequestView,
    ScalingDecision,
)
from llumnix.policies.dispatch import FreenessDispatch
from llumnix.policies.guard import attempt
from llumnix.policies.pairing import DrainPairing, FreenessPairing
from llumnix.policies.registry import (
    NO_MOVES,
    dispatch_policy,
    pairing_policy,
    relief_policy,
    roles_policy,
    scaling_policy,
)
from llumnix.policies.relief import CheapestRelief
from llumnix.policies.roles import Disaggregate

SPEAK_AGAIN_S = 60.0
ON_INSTANCES = ("selection", "preemption")
TEXT_MAX = 300

Decision = TypeVar("Decision", DispatchDecision, EntryDecision, Move, ReliefDecision)


class Faults:
    """Faults of the running policies, by kind, until they are told."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, float, int]] = {}
        self._pending: list[Logged] = []

    def note(self, kind: str, name: str, what: str, now: float) -> None:
        """One more fault."""
        instead = "nothing changes" if kind == "scaling" else "the default decided instead"
        self._note(kind, name, f"{kind} policy {name!r} {what[:TEXT_MAX]}", instead, now)

    def reported(self, instance_id: str, fault: str, config: SchedulerConfig, now: float) -> None:
        """One that an instance reports (``policy_fault`` of its report): of a policy that runs there, or that
        the settings cannot hold there."""
        kind, _, what = fault.partition(": ")
        if kind in ON_INSTANCES:
            self.note(kind, getattr(config, f"{kind}_policy"), f"on {instance_id}: {what}", now)
        else:
            what = f"settings cannot hold on {instance_id}: {fault[:TEXT_MAX]}"
            self._note("settings", "", what, "it goes by those it had", now)

    def take(self) -> list[Logged]:
        """What there is to tell."""
        pending, self._pending = self._pending, []
        return pending

    def _note(self, kind: str, name: str, what: str, instead: str, now: float) -> None:
        told_of, told_at, untold = self._told.get(kind, ("", 0.0, 0))
        if name == told_of and now - told_at < SPEAK_AGAIN_S:
            self._told[kind] = name, told_at, untold + 1
            return
        if name != told_of:  # another policy since: what went untold was not its fault
            untold = 0
        self._told[kind] = name, now, 0
        again = f" ({untold} more times in the last {now - told_at:.0f} s)" if untold else ""
        text = f"{what}{again}; {instead}"
        self._pending.append(Logged("policy_error", text, {"kind": kind, "policy": name}))


class GuardedDispatch:
    """The dispatch policy that the configuration names. Raises ConfigurationError if it cannot be had."""

    def __init__(self, config: SchedulerConfig, faults: Faults) -> None:
        self.name = config.dispatch_policy
        self._policy = dispatch_policy(config)
        self._default = FreenessDispatch(config)
        self._faults = faults
        self._score: Callable[[InstanceView], float] | None = getattr(self._policy, "score", None)
        self._score_fault = ""

    @property
    def score(self) -> Callable[[InstanceView], float] | None:
        """What candidates are ordered by; None: queue freeness."""
        return None if self._score is None else self._checked_score

    def place(self, request: RequestView, candidates: Sequence[InstanceView], now: float) -> DispatchDecision:
        """The policy's decision, or the default's."""
        decision, fault = attempt(self._policy.place, request, candidates)
        if self._score_fault:
            self._faults.note("dispatch", self.name, self._score_fault, now)
            self._score_fault = ""
        if isinstance(decision, DispatchDecision) and isinstance(decision.reason, str):
            return decision
        return self.overrule(request, candidates, fault or f"returned {decision!r}", now)

    def overrule(
        self, request: RequestView, candidates: Sequence[InstanceView], fault: str, now: float
    ) -> DispatchDecision:
        """Tell what is wrong with the policy's decision, and let the default decide."""
        self._faults.note("dispatch", self.name, fault, now)
        if self._score is not None:  # else they come in the default's order, and only the first are looked at
            candidates = sorted(candidates, key=lambda view: (-view.queue_freeness, view.instance_id))
        return _instead(self._default.place(request, candidates), self.name)

    def _checked_score(self, view: InstanceView) -> float:
        assert self._score is not None
        score, fault = attempt(self._score, view)
        if isinstance(score, int | float) and abs(score) <= float_info.max:
            return score
        self._score_fault = fault or f"scored {view.instance_id} {score!r}"
        return view.queue_freeness


class GuardedPairing:
    """The pairing policy that the configuration names. Raises ConfigurationError if it cannot be had."""

    def __init__(self, config: SchedulerConfig, faults: Faults) -> None:
        self.name = config.pairing_policy
        self._policy = pairing_policy(config)
        self._default = FreenessPairing(config)
        self._drain = DrainPairing(config)
        self._faults = faults
        self._moves_max = config.moves_per_round_max

    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        """The policy's moves, or the default's; at most ``moves_per_round_max``. A drain is an order and no
        matter of balance: what a policy leaves on draining instances moves as well, unless it is the one by
        which nothing moves."""
        moves = self._chosen(cluster)
        if self.name == NO_MOVES:
            return moves
        left = {view.instance_id for view in cluster.instances if view.state is InstanceState.DRAINING}
        left.difference_update(move.source_id for move in moves)
        if left:
            giving = {move.source_id for move in moves}
            drained = (move for move in self._drain.pair(cluster) if move.source_id in left)
            moves += tuple(move for move in drained if move.target_id not in giving)
        return moves[: self._moves_max]

    def _chosen(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        moves, fault = attempt(self._policy.pair, cluster)
        if not fault and isinstance(moves, tuple) and all(map(_is_move, moves)):
            return moves
        self._faults.note("pairing", self.name, fault or f"returned {moves!r}", cluster.now)
        return tuple(_instead(move, self.name) for move in self._default.pair(cluster))


class GuardedRoles:
    """The roles policy that the configuration names. Raises ConfigurationError if it cannot be had."""

    def __init__(self, config: SchedulerConfig, faults: Faults) -> None:
        self.name = config.roles_policy
        self._policy = roles_policy(config)
        self._default = Disaggregate(config)
        self._faults = faults

    def enter(
        self, request: RequestView, entry: InstanceView, decode: InstanceView, now: float
    ) -> EntryDecision:
        """The policy's decision, or the default's."""
        decision, fault = attempt(self._policy.enter, request, entry, decode)
        if isinstance(decision, EntryDecision) and isinstance(decision.reason, str):
            return decision
        self._faults.note("roles", self.name, fault or f"returned {decision!r}", now)
        return _instead(self._default.enter(request, entry, decode), self.name)

    def leave(
        self, request: MoveCandidate, source: InstanceView, targets: Sequence[InstanceView], now: float
    ) -> Move | None:
        """The policy's move of that request off that instance, or the default's."""
        move, fault = attempt(self._policy.leave, request, source, targets)
        if not fault and (move is None or _is_move(move)):
            expected = request.request_id, source.instance_id
            if move is None or (move.request_id, move.source_id) == expected:
                return move
        self._faults.note("roles", self.name, fault or f"returned {move!r}", now)
        by_default = self._default.leave(request, source, targets)
        return None if by_default is None else _instead(by_default, self.name)


class GuardedRelief:
    """The relief policy that the configuration names. Raises ConfigurationError if it cannot be had."""

    def __init__(self, config: SchedulerConfig, faults: Faults) -> None:
        self.name = config.relief_policy
        self._policy = relief_policy(config)
        self._default = CheapestRelief(config)
        self._faults = faults

    def relieve(
        self, victim: ReliefView, source: InstanceView, targets: Sequence[InstanceView], now: float
    ) -> ReliefDecision:
        """The policy's decision, or the default's."""
        decision, fault = attempt(self._policy.relieve, victim, source, targets)
        if isinstance(decision, ReliefDecision) and isinstance(decision.reason, str):
            chosen, known = decision.instance_id, {view.instance_id for view in targets}
            if chosen is None or (isinstance(chosen, str) and chosen in known):
                return decision
            fault = f"chose {chosen!r}, which was no target"
        self._faults.note("relief", self.name, fault or f"returned {decision!r}", now)
        return _instead(self._default.relieve(victim, source, targets), self.name)


class GuardedScaling:
    """The scaling policy that the configuration names. Raises ConfigurationError if it cannot be had."""

    def __init__(self, config: SchedulerConfig, faults: Faults) -> None:
        self.name = config.scaling_policy
        self._policy = scaling_policy(config)
        self._faults = faults

    def scale(self, cluster: ClusterSnapshot) -> ScalingDecision:
        """The policy's decision; no change where it fails."""
        decision, fault = attempt(self._policy.scale, cluster)
        if isinstance(decision, ScalingDecision) and type(decision.change) is int:
            return decision
        self._faults.note("scaling", self.name, fault or f"returned {decision!r}", cluster.now)
        return ScalingDecision(0, "")


def _instead(decision: Decision, name: str) -> Decision:
    """The default's decision, which says for whom it was made."""
    reason = f"{decision.reason}; the default's, as {name} failed" if decision.reason else decision.reason
    return replace(decision, reason=reason)


def _is_move(move: object) -> bool:
    return isinstance(move, Move) and all(
        isinstance(part, str) for part in (move.request_id, move.source_id, move.target_id, move.reason)
    )
