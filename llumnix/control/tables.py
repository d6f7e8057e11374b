"""What the manager knows of the cluster as tables for administrators. Called by the global scheduler only."""

from llumnix.control.cluster_view import ClusterView
from llumnix.control.instance_record import InstanceRecord
from llumnix.core.admin import ClusterSummary, InstanceRow
from llumnix.core.messages.control import InstanceState


def summary(
    cluster: ClusterView,
    *,
    migrations_committed: int,
    migrations_failed: int,
    frontends: int,
    manager_incarnation: str,
    uptime_s: float,
) -> ClusterSummary:
    """The cluster in one line."""
    live = cluster.live()
    reports = [record.report for record in live if record.report is not None]
    return ClusterSummary(
        model=live[0].hello.model if live else "",
        instances=len(live),
        serving=sum(record.state is InstanceState.SERVING for record in live),
        running=sum(report.running for report in reports),
        waiting=sum(report.waiting for report in reports),
        migrations_running=cluster.moves.running_count,
        migrations_committed=migrations_committed,
        migrations_failed=migrations_failed,
        frontends=frontends,
        manager_incarnation=manager_incarnation,
        uptime_s=uptime_s,
    )


def instance_rows(cluster: ClusterView, now: float) -> tuple[InstanceRow, ...]:
    """The table of instances, ordered by id."""
    return tuple(_row(record, now) for record in cluster.records())


def _row(record: InstanceRecord, now: float) -> InstanceRow:
    report, view = record.report, record.view
    return InstanceRow(
        instance_id=record.hello.instance_id,
        incarnation=record.hello.incarnation,
        role=record.role,
        state=record.state,
        model=record.hello.model,
        address=record.hello.address,
        capacity_blocks=report.capacity_blocks if report else record.hello.kv_layout.blocks,
        used_blocks=report.used_blocks + report.reserved_blocks if report else 0,
        running=report.running if report else 0,
        waiting=report.waiting if report else 0,
        migrating_in=view.migrating_in if view else 0,
        migrating_out=view.migrating_out if view else 0,
        freeness=record.shown_freeness,
        step_ms=report.step_s * 1e3 if report else 0.0,
        tokens_total=report.tokens_total if report else 0,
        preemptions_total=report.preemptions_total if report else 0,
        report_age_s=max(0.0, now - record.heard_at),
        pid=record.hello.kv_endpoint.pid,
        swap=report.swap if report else None,
        adapters=report.adapters if report else (),
        drained=record.drained,
    )
