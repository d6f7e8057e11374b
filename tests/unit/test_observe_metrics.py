"""Metrics: what goes in comes out, in Prometheus' format, with labels that cannot grow without bound."""

from dataclasses import replace

import pytest
from control_driving import ToyCluster
from prometheus_client.parser import text_string_to_metric_families

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import MigrationOutcome
from llumnix.observe.event_log import EventLog
from llumnix.observe.metrics import ClusterMetrics, FrontendMetrics

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(rendered: bytes) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(rendered.decode())
        for sample in family.samples
    }


def test_a_frontends_requests_are_counted_and_timed() -> None:
    metrics = FrontendMetrics()
    metrics.request_started(100)
    metrics.request_started(20)
    metrics.first_token(0.2)
    metrics.tokens(5)
    metrics.token_gap(0.04)
    metrics.continued()
    metrics.request_ended("completed", 1.5)
    metrics.request_rejected()
    found = samples(metrics.render())
    assert found["llumnix_requests_total", (("outcome", "completed"),)] == 1
    assert found["llumnix_requests_total", (("outcome", "rejected"),)] == 1
    assert found["llumnix_requests_total", (("outcome", "client_gone"),)] == 0
    assert found["llumnix_streams_running", ()] == 1
    assert found["llumnix_prompt_tokens_total", ()] == 120
    assert found["llumnix_output_tokens_total", ()] == 5
    assert found["llumnix_continuations_total", ()] == 1
    assert found["llumnix_time_to_first_token_seconds_bucket", (("le", "0.1"),)] == 0
    assert found["llumnix_time_to_first_token_seconds_bucket", (("le", "0.25"),)] == 1
    assert found["llumnix_inter_token_seconds_sum", ()] == pytest.approx(0.04)
    assert found["llumnix_request_seconds_count", ()] == 1


def test_two_frontends_in_one_process_do_not_mix() -> None:
    one, other = FrontendMetrics(), FrontendMetrics()
    one.tokens(3)
    assert samples(other.render())["llumnix_output_tokens_total", ()] == 0


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
    assert found["llumnix_instance_kv_usage_ratio", (("instance", "a"),)] == pytest.approx(
        0.96 - 0.12 * moved
    )
    assert found["llumnix_instance_requests_running", (("instance", "b"),)] == moved


def test_only_committed_migrations_are_timed() -> None:
    _, log = cluster_with_history()
    (event, *_) = [event for event in log.after(0) if event.kind == "migration_ended"]
    metrics = ClusterMetrics()
    metrics.take([replace(event, fields={**event.fields, "outcome": MigrationOutcome.ABORTED.value})])
    found = samples(metrics.render())
    assert found["llumnix_migrations_total", (("outcome", "aborted"),)] == 1
    assert found["llumnix_migration_pause_seconds_count", ()] == 0


def test_instances_that_are_gone_take_their_series_along() -> None:
    cluster, _ = cluster_with_history()
    metrics = ClusterMetrics()
    metrics.update(cluster.core.summary(cluster.now), cluster.core.instance_rows(cluster.now))
    cluster.do(cluster.core.instance_ended("b", "a", cluster.now))
    metrics.update(cluster.core.summary(cluster.now), cluster.core.instance_rows(cluster.now))
    found = samples(metrics.render())
    assert {labels for name, labels in found if name.startswith("llumnix_instance_")} == {
        (("instance", "a"),)
    }
    assert found["llumnix_instances", (("state", "down"),)] == 1


def test_a_restarted_managers_events_are_taken_from_their_start() -> None:
    _, log = cluster_with_history()
    metrics = ClusterMetrics()
    metrics.take(log.after(0))
    before = samples(metrics.render())["llumnix_migrations_total", (("outcome", "committed"),)]
    metrics.restarted()
    metrics.take(log.after(0))
    assert samples(metrics.render())["llumnix_migrations_total", (("outcome", "committed"),)] == 2 * before


def test_no_label_carries_what_users_choose() -> None:
    cluster, log = cluster_with_history()
    metrics, frontend = ClusterMetrics(), FrontendMetrics()
    metrics.update(cluster.core.summary(cluster.now), cluster.core.instance_rows(cluster.now))
    metrics.take(log.after(0))
    labels = {name for _, pairs in samples(metrics.render() + frontend.render()) for name, _ in pairs}
    assert labels <= {"instance", "state", "outcome", "le"}
