"""Metrics: what goes in comes out, in Prometheus' format, with labels that cannot grow without bound."""

from dataclasses import replace

import pytest
from control_driving import ToyCluster
from prometheus_client.parser import text_string_to_metric_families

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import MigrationOutcome
from llumnix.observe.event_log import EventLog
from llumnix.observe.metrics import ClusterMetrics

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(rendered: bytes) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(rendered.decode())
        for sample in family.samples
    }


def cluster_with_history() -> tuple[ToyCluster, EventLog]:
    """A cluster that moved something, and its log."""
    cluster = ToyCluster(SchedulerConfig(low_freeness=4.0, high_freeness=8.0), a=100, b=100)
    cluster.instances["a"].running = {f"r{number}": 12 for number in range(8)}
    cluster.step()
    cluster.report()
    log = EventLog()
    for number, logged in enumerate(cluster.logged):
        log.append(float(number), logged.kind, logged.text, dict(logged.fields))
    return cluster, log


def test_the_cluster_as_the_manager_sees_it() -> None:
    cluster, log = cluster_with_history()
    metrics = ClusterMetrics()
    for _ in range(2):  # the same events a second time count once
        metrics.update(cluster.core.summary(cluster.now), cluster.core.instance_rows(cluster.now))
        metrics.take(log.after(0))
    found = samples(metrics.render())
    moved = len(cluster.orders)
    assert moved > 0
    assert found["llumnix_migrations_total", (("outcome", "committed"),)] == moved
    assert found["llumnix_migrations_total", (("outcome", "refused"),)] == 0
    assert found["llumnix_migrated_kv_bytes_total", ()] == 4096 * moved
    assert found["llumnix_migration_pause_seconds_count", ()] == moved
    assert found["llumnix_migration_pause_seconds_sum", ()] == pytest.approx(0.01 * moved)
    assert found["llumnix_instances", (("state", "serving"),)] == 2


def test_only_committed_migrations_are_timed() -> None:
    _, log = cluster_with_history()
    (event, *_) = [event for event in log.after(0) if event.kind == "migration_ended"]
    metrics = ClusterMetrics()
    metrics.take([replace(event, fields={**event.fields, "outcome": MigrationOutcome.ABORTED.value})])
    found = samples(metrics.render())
    assert found["llumnix_migrations_total", (("outcome", "aborted"),)] == 1
    assert found["llumnix_migration_pause_seconds_count", ()] == 0


def test_a_restarted_managers_events_are_taken_from_their_start() -> None:
    cluster, log = cluster_with_history()
    metrics = ClusterMetrics()
    summary, rows = cluster.core.summary(cluster.now), cluster.core.instance_rows(cluster.now)
    metrics.update(summary, rows)
    metrics.take(log.after(0))
    assert metrics.last_event == len(cluster.logged)
    before = samples(metrics.render())["llumnix_migrations_total", (("outcome", "committed"),)]
    metrics.update(replace(summary, manager_incarnation="m2"), rows)
    assert metrics.last_event == 0
    metrics.take(log.after(0))
    assert samples(metrics.render())["llumnix_migrations_total", (("outcome", "committed"),)] == 2 * before


def test_instances_are_counted_by_state() -> None:
    cluster, _ = cluster_with_history()
    cluster.do(cluster.core.instance_ended("b", "a", cluster.now))
    metrics = ClusterMetrics()
    metrics.update(cluster.core.summary(cluster.now), cluster.core.instance_rows(cluster.now))
    found = samples(metrics.render())
    assert found["llumnix_instances", (("state", "serving"),)] == 1
    assert found["llumnix_instances", (("state", "down"),)] == 1


def test_no_label_carries_what_users_choose() -> None:
    cluster, log = cluster_with_history()
    metrics = ClusterMetrics()
    metrics.update(cluster.core.summary(cluster.now), cluster.core.instance_rows(cluster.now))
    metrics.take(log.after(0))
    labels = {name for _, pairs in samples(metrics.render()) for name, _ in pairs}
    assert labels == {"state", "outcome", "le"}
