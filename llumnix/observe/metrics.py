"""The cluster's Prometheus metrics, as a subscriber: the manager's tables and events in, the text format out.

What one frontend counts about its own answers, and the instances' load, is in api/metrics.py; this is what
only the manager knows: instances by state, and migrations with their outcomes and pauses. The registry is its
own, so nothing global is touched. No label carries a user's value: tenants and request ids would grow without
bound.
"""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llumnix.core.admin import ClusterSummary, Event, InstanceRow
from llumnix.core.messages.control import InstanceState, MigrationOutcome

PAUSE_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
MOVE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)


class ClusterMetrics:
    """The cluster as the manager sees it. ``last_event`` is the number of the last event taken: ask the
    manager for those after it."""

    def __init__(self) -> None:
        self.last_event = 0
        self._manager = ""
        self._registry = registry = CollectorRegistry()
        self._instances = Gauge("llumnix_instances", "Instances by state.", ["state"], registry=registry)
        self._frontends = Gauge("llumnix_frontends", "Frontends known.", registry=registry)
        self._moving = Gauge("llumnix_migrations_running", "Migrations under way.", registry=registry)
        self._migrations = Counter(
            "llumnix_migrations", "Migrations that ended, by outcome.", ["outcome"], registry=registry
        )
        for outcome in MigrationOutcome:
            self._migrations.labels(outcome.value)
        self._moved_bytes = Counter(
            "llumnix_migrated_kv_bytes", "KV bytes of committed migrations.", registry=registry
        )
        self._pause = Histogram(
            "llumnix_migration_pause_seconds",
            "Time a migrated request was in no batch, as its source saw it.",
            buckets=PAUSE_BUCKETS_S,
            registry=registry,
        )
        self._move = Histogram(
            "llumnix_migration_seconds",
            "From a migration's order to its commit.",
            buckets=MOVE_BUCKETS_S,
            registry=registry,
        )

    def update(self, summary: ClusterSummary, rows: Sequence[InstanceRow]) -> None:
        """Take the manager's tables as they are now. A manager that has restarted numbers its events anew."""
        if summary.manager_incarnation != self._manager:
            self._manager, self.last_event = summary.manager_incarnation, 0
        self._frontends.set(summary.frontends)
        self._moving.set(summary.migrations_running)
        for state in InstanceState:
            self._instances.labels(state.value).set(sum(row.state is state for row in rows))

    def take(self, events: Sequence[Event]) -> None:
        """Count the migrations among events; those taken before are skipped."""
        for event in events:
            if event.sequence > self.last_event:
                self.last_event = event.sequence
                if event.kind == "migration_ended":
                    self._migration_ended(event)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return bytes(generate_latest(self._registry))

    def _migration_ended(self, event: Event) -> None:
        outcome = str(event.fields["outcome"])
        self._migrations.labels(outcome).inc()
        if outcome == MigrationOutcome.COMMITTED.value:
            self._moved_bytes.inc(float(event.fields["kv_bytes"]))
            self._pause.observe(float(event.fields["pause_s"]))
            self._move.observe(float(event.fields["duration_s"]))
