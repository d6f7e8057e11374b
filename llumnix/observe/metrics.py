"""Prometheus metrics, as subscribers: plain method calls in, the text format out.

Each collector has a registry of its own, so that several can live in one process and nothing global is
touched. No label ever carries a user's value: tenants and request ids would grow without bound, so only
instances, outcomes and states are labels. Instances that are gone take their series with them.

``FrontendMetrics`` is fed by the frontend, ``ClusterMetrics`` by whoever reads the manager's tables and
events.
"""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llumnix.core.admin import ClusterSummary, Event, InstanceRow
from llumnix.core.messages.control import InstanceState, MigrationOutcome

TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
TOKEN_GAP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
PAUSE_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
MOVE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)
OUTCOMES = ("completed", "client_gone", "rejected", "failed")


class FrontendMetrics:
    """One frontend. Times in seconds."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "llumnix_requests", "Requests that ended, by outcome.", ["outcome"], registry=registry
        )
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._streams = Gauge("llumnix_streams_running", "Requests in flight.", registry=registry)
        self._prompt_tokens = Counter("llumnix_prompt_tokens", "Prompt tokens accepted.", registry=registry)
        self._output_tokens = Counter("llumnix_output_tokens", "Tokens delivered.", registry=registry)
        self._continuations = Counter(
            "llumnix_continuations", "Requests continued after their instance was lost.", registry=registry
        )
        self._ttft = Histogram(
            "llumnix_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self._token_gap = Histogram(
            "llumnix_inter_token_seconds",
            "Time between a request's tokens.",
            buckets=TOKEN_GAP_BUCKETS_S,
            registry=registry,
        )
        self._duration = Histogram(
            "llumnix_request_seconds",
            "From a request's arrival to its end.",
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )

    def request_started(self, prompt_tokens: int) -> None:
        """A request was accepted."""
        self._streams.inc()
        self._prompt_tokens.inc(prompt_tokens)

    def request_ended(self, outcome: str, duration_s: float) -> None:
        """An accepted request ended: ``completed``, ``client_gone`` or ``failed``."""
        self._streams.dec()
        self._requests.labels(outcome).inc()
        self._duration.observe(duration_s)

    def request_rejected(self) -> None:
        """A request was refused before it began."""
        self._requests.labels("rejected").inc()

    def first_token(self, ttft_s: float) -> None:
        """A request's first tokens came."""
        self._ttft.observe(ttft_s)

    def tokens(self, count: int) -> None:
        """So many tokens were delivered."""
        self._output_tokens.inc(count)

    def token_gap(self, gap_s: float) -> None:
        """Time between two deliveries of one request, per token."""
        self._token_gap.observe(gap_s)

    def continued(self) -> None:
        """A request went on elsewhere after its instance was lost."""
        self._continuations.inc()

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return bytes(generate_latest(self._registry))


class ClusterMetrics:
    """The cluster as the manager sees it."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._last_event = 0
        self._shown: tuple[str, ...] = ()
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
        self._by_instance = {
            name: Gauge(f"llumnix_instance_{name}", text, ["instance"], registry=registry)
            for name, text in _INSTANCE_GAUGES.items()
        }

    def update(self, summary: ClusterSummary, rows: Sequence[InstanceRow]) -> None:
        """Take the manager's tables as they are now."""
        self._frontends.set(summary.frontends)
        self._moving.set(summary.migrations_running)
        for state in InstanceState:
            self._instances.labels(state.value).set(sum(row.state is state for row in rows))
        live = [row for row in rows if row.state is not InstanceState.DOWN]
        for row in live:
            for name, value in _instance_values(row).items():
                self._by_instance[name].labels(row.instance_id).set(value)
        now_shown = tuple(row.instance_id for row in live)
        for instance_id in self._shown:
            if instance_id not in now_shown:
                for gauge in self._by_instance.values():
                    gauge.remove(instance_id)
        self._shown = now_shown

    def take(self, events: Sequence[Event]) -> None:
        """Count the migrations among new events. An event taken before is skipped; numbers that start again
        (a manager that restarted) are taken from their beginning: call `restarted` first."""
        for event in events:
            if event.sequence <= self._last_event:
                continue
            self._last_event = event.sequence
            if event.kind == "migration_ended":
                self._migration_ended(event)

    def restarted(self) -> None:
        """The manager's event numbers start from 1 again."""
        self._last_event = 0

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


_INSTANCE_GAUGES = {
    "kv_usage_ratio": "Share of KV blocks in use.",
    "kv_blocks_used": "KV blocks in use.",
    "kv_blocks": "KV blocks in all.",
    "requests_running": "Requests in the batch.",
    "requests_waiting": "Requests in the queue.",
    "freeness": "Decode steps the batch can still run; negative is overloaded.",
    "step_seconds": "Recent mean time of a step.",
    "tokens_computed": "Tokens computed since the instance began.",
    "preemptions": "Preemptions since the instance began.",
    "report_age_seconds": "Age of the last load report.",
}


def _instance_values(row: InstanceRow) -> dict[str, float]:
    return {
        "kv_usage_ratio": row.used_blocks / row.capacity_blocks if row.capacity_blocks else 0.0,
        "kv_blocks_used": row.used_blocks,
        "kv_blocks": row.capacity_blocks,
        "requests_running": row.running,
        "requests_waiting": row.waiting,
        "freeness": row.freeness,
        "step_seconds": row.step_ms / 1e3,
        "tokens_computed": row.tokens_total,
        "preemptions": row.preemptions_total,
        "report_age_seconds": row.report_age_s,
    }
