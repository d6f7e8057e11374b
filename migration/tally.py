"""What a migration did, for the report that its source sends to the manager in the end. Kept by
migration/source.py; made empty by instance/agent_outgoing.py for one that was never begun.
"""

from llumnix.core.messages.control import InstanceHello, MigrateOrder, MigrationEnded, MigrationOutcome


class Tally:
    """``stages`` before the commit; ``blocks`` moved, those of the commit too; ``taken_out_at`` is when the
    request left the source's batch or queue for good."""

    def __init__(self, now: float) -> None:
        self.stages = self.blocks = 0
        self.taken_out_at: float | None = None
        self._began = now

    def start_again(self) -> None:
        """What was moved so far counts no more."""
        self.stages = self.blocks = 0

    def ended(
        self, order: MigrateOrder, me: InstanceHello, outcome: MigrationOutcome, reason: str, now: float
    ) -> MigrationEnded:
        """The report."""
        taken_out = self.taken_out_at is not None
        return MigrationEnded(
            migration_id=order.migration_id,
            request_id=order.request_id,
            source_id=me.instance_id,
            target_id=order.target_id,
            outcome=outcome,
            reason=reason,
            stages=self.stages + taken_out,
            kv_bytes=self.blocks * me.kv_layout.block_bytes,
            duration_s=now - self._began,
            pause_s=0.0 if self.taken_out_at is None else now - self.taken_out_at,
        )
