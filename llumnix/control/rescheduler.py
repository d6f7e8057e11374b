"""Migrations as the manager sees them: ordered, running, ended. Runs the rescheduling rounds.

The manager orders; the two instances carry a migration out between themselves, and the source says how it
ended. An order or an answer may be lost, so every migration also ends here by itself: when its source has
ended, when the source's reports show that it never heard of it, or by age. That frees this ledger and nothing
else; who owns the request is never decided here. Called by the global scheduler only.
"""

from dataclasses import dataclass

from llumnix.control.backoff import Backoff
from llumnix.control.cluster_view import ClusterView
from llumnix.control.decision_log import Decision, DecisionLog
from llumnix.control.effects import Logged
from llumnix.control.instance_record import InstanceRecord
from llumnix.control.ledger import MOVES_MAX, MoveEntry
from llumnix.control.policy_guard import GuardedPairing
from llumnix.core.admin import MigrationResult
from llumnix.core.config import SchedulerConfig
from llumnix.core.effects import Send
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import (
    InstanceState,
    MigrateOrder,
    MigrationEnded,
    MigrationOutcome,
)
from llumnix.core.views import Move
from llumnix.policies.freeness import Load

MOVE_MEMORY_S = 45.0
ORDER_LOST_AFTER_S = 10.0
TARGET_REST_S = 0.5

SOURCES = (InstanceState.SERVING, InstanceState.DRAINING)


@dataclass(frozen=True, slots=True)
class Ended:
    """A migration that ended, and what there is to do about it."""

    result: MigrationResult
    logged: Logged


class Rescheduler:
    """Orders migrations, by its rounds or for an administrator, and follows them to their end."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: GuardedPairing,
        manager_incarnation: str,
        cluster: ClusterView,
        log: DecisionLog,
    ) -> None:
        self.committed = 0
        self.failed = 0
        self._incarnation = manager_incarnation
        self._cluster = cluster
        self._policy = policy
        self._log = log
        self._requests = Backoff(config.rest_s)
        self._targets = Backoff(TARGET_REST_S)
        self._orders = 0

    def use(self, config: SchedulerConfig, policy: GuardedPairing) -> None:
        """Go by these settings and this policy from now on. Rests that have begun stay as long as they
        are."""
        self._policy = policy
        self._requests.base_s = config.rest_s

    def round(self, now: float) -> list[Send | Logged]:
        """Let the pairing policy choose, and order what it chose."""
        resting = frozenset((*self._requests.resting(now), *self._cluster.moves.moving_requests))
        closed = frozenset(self._targets.resting(now))
        effects: list[Send | Logged] = []
        for move in self._policy.pair(self._cluster.snapshot(now, resting, closed)):
            wrong = self.unfit(move, self._adapter(move))
            if wrong:
                effects.append(Logged("move_ignored", f"{move.request_id} not moved: {wrong}"))
                self._requests.failed(move.request_id, now)
            else:
                effects += self.order(move, self._blocks(move), now, policy=self._policy.name)[1]
        return effects

    def order(
        self, move: Move, blocks: int, now: float, *, policy: str = ""
    ) -> tuple[str, list[Send | Logged]]:
        """Order a migration that ``unfit`` has nothing against. Returns its id and what to send and log."""
        source, target = self._cluster.get(move.source_id), self._cluster.get(move.target_id)
        if source is None or target is None:
            raise InvariantError(f"no record of {move.source_id} or {move.target_id}")
        self._orders += 1
        migration_id = f"{self._incarnation}-{self._orders}"
        self._cluster.begin_move(
            MoveEntry(migration_id, move.request_id, move.source_id, move.target_id, blocks, now)
        )
        self._log.add(
            move.request_id,
            Decision(now, "move ordered", move.source_id, move.target_id, policy, move.reason, move.scores),
        )
        order = MigrateOrder(
            migration_id=migration_id,
            request_id=move.request_id,
            target_id=move.target_id,
            target_incarnation=target.hello.incarnation,
            target_address=target.hello.address,
            reason=move.reason,
        )
        text = f"{move.request_id} {move.source_id} to {move.target_id}: {move.reason}"
        fields: dict[str, str | int | float | bool] = {
            "migration": migration_id,
            "request": move.request_id,
            "source": move.source_id,
            "target": move.target_id,
            "blocks": blocks,
        }
        return migration_id, [Send(source.hello.address, order), Logged("migration_ordered", text, fields)]

    def _unfit_target(
        self, source: InstanceRecord, target: InstanceRecord | None, target_id: str, adapter: str
    ) -> str:
        if target is None:
            return f"there is no instance {target_id}"
        if target is source:
            return f"it is already on {target_id}"
        if target.state is not InstanceState.SERVING:
            return f"{target_id} is {target.state.value}"
        ours, theirs = source.hello, target.hello
        same_shape = _shape(source) == _shape(target)
        if ours.model != theirs.model or not same_shape:
            return f"{ours.instance_id} and {target_id} hold different models or KV layouts"
        if not target.serves(adapter):
            return f"{target_id} does not have the LoRA adapter {adapter}"
        return ""

    def resting(self, request_id: str, now: float) -> bool:
        """Whether a request is moving, or was moved or tried lately."""
        return self._cluster.moves.is_moving(request_id) or self._requests.rests(request_id, now)

    def closed(self, instance_id: str, now: float) -> bool:
        """Whether an instance refused a migration just now."""
        return self._targets.rests(instance_id, now)

    def ended(self, message: MigrationEnded, now: float) -> Ended | None:
        """A source says how a migration ended. None: it is not one of ours, or has ended before."""
        committed = message.outcome is MigrationOutcome.COMMITTED
        move = self._cluster.end_move(message.migration_id, now, committed=committed)
        if move is None:
            return None
        result = MigrationResult(
            migration_id=message.migration_id,
            request_id=move.request_id,
            source_id=move.source_id,
            target_id=move.target_id,
            outcome=message.outcome,
            reason=message.reason,
            stages=message.stages,
            kv_bytes=message.kv_bytes,
            duration_s=message.duration_s,
            pause_s=message.pause_s,
        )
        return self._close(result, now)

    def instance_ended(self, instance_id: str, now: float) -> list[Ended]:
        """The instance's process has ended: what it was the source of will never be answered."""
        moves = [move for move in self._cluster.moves.running if move.source_id == instance_id]
        return [self._give_up(move, "its source has ended", now) for move in moves]

    def expire(self, now: float) -> list[Ended]:
        """Give up migrations nobody will answer for, and forget old rests."""
        self._requests.expire(now)
        self._targets.expire(now)
        ended = []
        for move in self._cluster.moves.running:
            if now - move.ordered_at > MOVE_MEMORY_S:
                ended.append(self._give_up(move, f"no word of it for {MOVE_MEMORY_S:.0f} s", now))
            elif now - move.ordered_at > ORDER_LOST_AFTER_S and self._never_heard(move):
                ended.append(self._give_up(move, "its source never began it", now))
        return ended

    def unfit(self, move: Move, adapter: str) -> str:
        """Why this migration, of a request with this LoRA adapter (empty: none), cannot be ordered; empty if
        it can."""
        source, target = self._cluster.get(move.source_id), self._cluster.get(move.target_id)
        if source is None or source.state not in SOURCES:
            return f"{move.source_id} cannot give it away"
        if self._cluster.moves.is_moving(move.request_id):
            return "it is moving already"
        if self._cluster.moves.running_count >= MOVES_MAX:
            return f"{MOVES_MAX} migrations are running"
        return self._unfit_target(source, target, move.target_id, adapter)

    def _blocks(self, move: Move) -> int:
        source = self._cluster.get(move.source_id)
        if source is None or source.view is None:
            return 0
        load = Load.of(source.view)
        named = (one for one in source.view.candidates if one.request_id == move.request_id)
        return next((load.demand(candidate) for candidate in named), 0)

    def _adapter(self, move: Move) -> str:
        source = self._cluster.get(move.source_id)
        offered = source.report.candidates if source is not None and source.report is not None else ()
        return next((one.adapter for one in offered if one.request_id == move.request_id), "")

    def _never_heard(self, move: MoveEntry) -> bool:
        source = self._cluster.get(move.source_id)
        if source is None or source.report is None:
            return False
        return source.heard_at > move.ordered_at + ORDER_LOST_AFTER_S / 2 and not source.report.migrating_out

    def _give_up(self, move: MoveEntry, reason: str, now: float) -> Ended:
        self._cluster.end_move(move.migration_id, now, committed=False)
        result = MigrationResult(
            migration_id=move.migration_id,
            request_id=move.request_id,
            source_id=move.source_id,
            target_id=move.target_id,
            outcome=MigrationOutcome.ABORTED,
            reason=reason,
            stages=0,
            kv_bytes=0,
            duration_s=now - move.ordered_at,
            pause_s=0.0,
        )
        return self._close(result, now)

    def _close(self, result: MigrationResult, now: float) -> Ended:
        kind = f"move {result.outcome.value}"
        self._log.add(
            result.request_id, Decision(now, kind, result.source_id, result.target_id, "", result.reason)
        )
        if result.outcome is MigrationOutcome.COMMITTED:
            self.committed += 1
            self._requests.succeeded(result.request_id, now)
            self._targets.forgive(result.target_id)
        else:
            self.failed += 1
            self._requests.failed(result.request_id, now)
            if result.outcome is MigrationOutcome.REFUSED:
                self._targets.failed(result.target_id, now)
        text = f"{result.request_id} {result.source_id} to {result.target_id}: {result.outcome.value}"
        if result.reason:
            text += f", {result.reason}"
        if result.outcome is MigrationOutcome.COMMITTED:
            text += f" ({result.stages} stages, {result.kv_bytes / 1e6:.1f} MB"
            text += f", paused {result.pause_s * 1e3:.1f} ms)"
        fields: dict[str, str | int | float | bool] = {
            "migration": result.migration_id,
            "request": result.request_id,
            "source": result.source_id,
            "target": result.target_id,
            "outcome": result.outcome.value,
            "reason": result.reason,
            "stages": result.stages,
            "kv_bytes": result.kv_bytes,
            "duration_s": result.duration_s,
            "pause_s": result.pause_s,
        }
        return Ended(result, Logged("migration_ended", text, fields))


def _shape(record: InstanceRecord) -> tuple[int, int, int, int, str]:
    layout = record.hello.kv_layout
    return layout.layers, layout.kv_heads, layout.block_size, layout.head_dim, layout.dtype
