"""What one frontend counts about its answers, and the instances' load at the moment of scraping, for
Prometheus."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llumnix.core.admin import InstanceRow

FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_TOKENS_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
INSTANCE_GAUGES = {
    "capacity_blocks": "KV blocks of the instance",
    "used_blocks": "KV blocks in use",
    "running": "requests running",
    "waiting": "requests waiting",
    "migrating_in": "migrations into the instance",
    "migrating_out": "migrations out of the instance",
    "freeness": "free blocks per running request after headroom; higher is freer",
    "step_ms": "recent mean step time in milliseconds",
    "tokens_total": "tokens computed since the instance started",
    "preemptions_total": "preemptions since the instance started",
}
SWAP_GAUGES = {
    "host_capacity": "KV blocks of the instance's host memory",
    "host_used": "KV blocks of host memory in use",
    "swapped_out": "requests swapped out since the instance started",
    "swapped_in": "requests swapped back in",
    "out_blocks": "KV blocks copied out for requests that gave way",
    "in_blocks": "KV blocks copied in",
    "ahead_blocks": "KV blocks of likely victims copied out ahead",
    "kept_blocks": "KV blocks of ended requests copied out for a next turn",
    "reused_blocks": "KV blocks that the host had already when their request gave way",
    "prefix_hits": "requests whose beginning was found in host memory",
    "prefix_blocks": "KV blocks that came from host memory instead of being computed",
    "host_full": "requests computed again for want of host memory",
    "errors": "copies that failed",
    "host_leased": "KV blocks of host memory kept for migrations not decided yet",
}


class AnswerTimer:
    """Times one choice: to its first tokens, then between chunks."""

    def __init__(self, clock: Callable[[], float], first: Histogram, between: Histogram) -> None:
        self._clock = clock
        self._first = first
        self._between = between
        self._last = clock()
        self._began = False

    def tokens(self) -> None:
        """A chunk with tokens has just come."""
        now = self._clock()
        (self._between if self._began else self._first).observe(now - self._last)
        self._began, self._last = True, now


class ApiMetrics:
    """One frontend's registry. ``clock`` is a monotonic one, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        self._calls = Counter(
            "llumnix_http_requests",
            "API calls by route and status",
            ["route", "status"],
            registry=self._registry,
        )
        self._prompt = Counter("llumnix_prompt_tokens", "prompt tokens taken in", registry=self._registry)
        self._generated = Counter(
            "llumnix_generated_tokens", "tokens sent to clients", registry=self._registry
        )
        self._first = Histogram(
            "llumnix_time_to_first_token_seconds",
            "from the call's opening to its first token",
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=self._registry,
        )
        self._between = Histogram(
            "llumnix_time_between_chunks_seconds",
            "between two chunks of a choice",
            buckets=BETWEEN_TOKENS_BUCKETS_S,
            registry=self._registry,
        )
        self._instances = {
            name: Gauge(f"llumnix_instance_{name}", text, ["instance"], registry=self._registry)
            for name, text in INSTANCE_GAUGES.items()
        }
        self._swaps = {
            name: Gauge(f"llumnix_instance_swap_{name}", text, ["instance"], registry=self._registry)
            for name, text in SWAP_GAUGES.items()
        }

    def call(self, route: str, status: int) -> None:
        """An API call was answered."""
        self._calls.labels(route, str(status)).inc()

    def tokens(self, prompt: int, generated: int) -> None:
        """An answer ended, finished or not."""
        self._prompt.inc(prompt)
        self._generated.inc(generated)

    def timer(self) -> AnswerTimer:
        """A timer for a choice that is being opened now."""
        return AnswerTimer(self._clock, self._first, self._between)

    def page(self, rows: Sequence[InstanceRow]) -> bytes:
        """The exposition page, with these instances and no others."""
        for name, gauge in self._instances.items():
            gauge.clear()
            for row in rows:
                gauge.labels(row.instance_id).set(getattr(row, name))
        for name, gauge in self._swaps.items():
            gauge.clear()
            for row in rows:
                if row.swap is not None:
                    gauge.labels(row.instance_id).set(getattr(row.swap, name))
        return generate_latest(self._registry)
