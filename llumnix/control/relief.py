"""Moves a request off an instance that reports that its blocks last only a few steps more.

Each report names the request that would give way first. One at a time leaves; the next report tells whether
that was enough. What does not leave, or comes too late, gives way where it is. What a migration takes is
learnt from those that have ended. Called by the global scheduler only.
"""

from llumnix.control.backoff import Backoff
from llumnix.control.cluster_view import ClusterView
from llumnix.control.decision_log import Decision, DecisionLog
from llumnix.control.effects import Logged
from llumnix.control.instance_record import InstanceRecord
from llumnix.control.policy_guard import GuardedRelief
from llumnix.control.rescheduler import Rescheduler
from llumnix.core.admin import MigrationResult
from llumnix.core.effects import Send
from llumnix.core.messages.control import MigrationOutcome
from llumnix.core.messages.load import Shortage
from llumnix.core.views import Move, ReliefView

TARGETS_MAX = 8
EXPLAIN_AGAIN_S = 5.0
MEAN_WEIGHT = 0.2


class Relief:
    """``copied_bytes_s`` and ``pause_s`` are means of what migrations did lately; 0.0: none has ended yet."""

    def __init__(
        self, policy: GuardedRelief, cluster: ClusterView, rescheduler: Rescheduler, log: DecisionLog
    ) -> None:
        self.copied_bytes_s = 0.0
        self.pause_s = 0.0
        self.policy = policy
        self._cluster = cluster
        self._rescheduler = rescheduler
        self._log = log
        self._told = Backoff(EXPLAIN_AGAIN_S)

    def reported(self, record: InstanceRecord, shortage: Shortage, now: float) -> list[Send | Logged]:
        """An instance reports that it runs short."""
        candidate, source_id = shortage.candidate, record.instance_id
        if self._cluster.moves.running_out(source_id) or self._rescheduler.resting(candidate.request_id, now):
            return []
        adapter = candidate.adapter
        first = self._cluster.candidates(0, (), decode=True, adapter=adapter)[:TARGETS_MAX]
        views = [*first, *self._cluster.candidates(0, (), decode=False, adapter=adapter)[:TARGETS_MAX]]
        targets = tuple(
            view
            for view in views
            if view.instance_id != source_id and not self._rescheduler.closed(view.instance_id, now)
        )
        kv_bytes = candidate.blocks * record.hello.kv_layout.block_bytes
        copy_s = kv_bytes / self.copied_bytes_s if self.copied_bytes_s else 0.0
        left_s = shortage.steps_left * record.seen.step_s
        loss_s = shortage.loss_s + record.end_gap_s  # it comes back when somebody has ended, at the earliest
        victim = ReliefView(candidate, left_s, loss_s, copy_s, self.pause_s)
        decision = self.policy.relieve(victim, record.seen, targets, now)
        if decision.instance_id is None:
            if decision.reason and not self._told.rests(candidate.request_id, now):
                self._told.succeeded(candidate.request_id, now)
                self._told.expire(now)
                entry = Decision(
                    now, "stays", source_id, "", self.policy.name, decision.reason, decision.scores
                )
                self._log.add(candidate.request_id, entry)
            return []
        move = Move(candidate.request_id, source_id, decision.instance_id, decision.reason, decision.scores)
        if self._rescheduler.unfit(move, candidate.adapter):
            return []
        return self._rescheduler.order(move, candidate.blocks, now, policy=self.policy.name)[1]

    def migration_ended(self, result: MigrationResult) -> None:
        """Learn from it what migrations take."""
        if result.outcome is not MigrationOutcome.COMMITTED or not result.kv_bytes or result.duration_s <= 0:
            return
        bytes_s = result.kv_bytes / result.duration_s
        weight = MEAN_WEIGHT if self.copied_bytes_s else 1.0
        self.copied_bytes_s += weight * (bytes_s - self.copied_bytes_s)
        self.pause_s += weight * (result.pause_s - self.pause_s)
