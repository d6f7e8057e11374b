"""Sends a workload to a real cluster through its HTTP API, each request at its time, and notes when tokens
came.

The cluster is ``llumnix serve`` in a process of its own, with exactly the settings it is given. Used by the
benchmarks that compare a real cluster with a simulated one or with itself (validation.py, live.py), and by
``llumnix profile`` for what serving adds to an engine.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from llumnix.bench.frontend import served_cluster
from llumnix.bench.frontend_client import DONE_EVENT, StreamingClient, completion_request
from llumnix.core.config import Config
from llumnix.core.config_source import to_toml
from llumnix.core.errors import ConfigurationError, LlumnixError
from llumnix.sim.lengths import BURSTGPT_IN, BURSTGPT_OUT, SHAREGPT_IN, SHAREGPT_OUT, Quantiles
from llumnix.sim.workload import Arrival

TOKEN_IDS = (32, 127)
"""Prompts are random tokens from here: every vocabulary has them."""
ADMIN_TIMEOUT_S = 60.0
EVENTS_PAGE = 1000
LENGTHS = {"burstgpt": (BURSTGPT_IN, BURSTGPT_OUT), "sharegpt": (SHAREGPT_IN, SHAREGPT_OUT)}


@dataclass(frozen=True, slots=True)
class Load:
    """What clients ask for. Lengths of real conversations by name, divided by ``shrink``, since a processor
    core is slow; Gamma arrivals at ``rate`` per second (``cv`` 1: Poisson)."""

    lengths: str
    shrink: float
    rate: float
    cv: float
    count: int

    def __post_init__(self) -> None:
        for name in ("rate", "cv", "shrink"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigurationError(f"--{name} must be above 0, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        """In a line."""
        arrivals = f"{self.rate:g}/s, CV {self.cv:g}"
        return f"{self.count} requests, {self.lengths} lengths / {self.shrink:g}, {arrivals}"

    def arrivals(self, tokens_max: int, seed: int) -> list[Arrival]:
        """The requests. Every answer has at least two tokens."""
        gaps_rng, in_rng, out_rng = np.random.default_rng(seed).spawn(3)
        shape = 1 / self.cv**2
        times = np.cumsum(gaps_rng.gamma(shape, 1 / (shape * self.rate), self.count))
        inputs, outputs = (_shrunk(lengths, self.shrink) for lengths in LENGTHS[self.lengths])
        answers = np.clip(outputs.draw(out_rng, self.count), 2, tokens_max // 2)
        prompts = np.minimum(inputs.draw(in_rng, self.count), tokens_max - answers)
        return [
            Arrival(float(at), int(prompt), int(answer))
            for at, prompt, answer in zip(times, prompts, answers, strict=True)
        ]


def _shrunk(lengths: Quantiles, shrink: float) -> Quantiles:
    points = tuple((share, max(1.0, tokens / shrink)) for share, tokens in lengths.points)
    return Quantiles(points, max(1, round(lengths.most / shrink)))


@dataclass(frozen=True, slots=True)
class Streamed:
    """What one client saw, in seconds from the run's begin. ``arrival`` is when it was to send and
    ``sent_s`` when it did; ``longest_gap_s`` between two chunks; ``problem`` is empty for an answer that is
    complete. ``request_id`` is the cluster's name for it, ``chunks_s`` when each of its chunks came."""

    arrival: Arrival
    sent_s: float
    first_s: float
    last_s: float
    longest_gap_s: float
    tokens: int
    problem: str
    request_id: str = ""
    chunks_s: tuple[float, ...] = ()

    @property
    def ttft_s(self) -> float:
        """Seconds from sending to the first token."""
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds between two tokens; for answers of two at least."""
        return (self.last_s - self.first_s) / (self.tokens - 1)


@contextmanager
def real_cluster(config: Config) -> Iterator["RealCluster"]:
    """A cluster with these settings, up and running."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(to_toml(config))
        file.flush()
        with served_cluster(["--config", file.name]) as (url, _):
            yield RealCluster(url)


class RealCluster:
    """A running cluster at ``url``."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def max_model_len(self) -> int:
        """Longest prompt + output that it takes."""
        answer = httpx.get(f"{self.url}/v1/models", trust_env=False, timeout=ADMIN_TIMEOUT_S)
        return int(answer.raise_for_status().json()["data"][0]["max_model_len"])

    def ask(self, path: str) -> Any:
        """GET /admin/``path``."""
        answer = httpx.get(f"{self.url}/admin/{path}", trust_env=False, timeout=ADMIN_TIMEOUT_S)
        answer.raise_for_status()
        return answer.json()

    def order(self, path: str, body: dict[str, Any]) -> Any:
        """POST /admin/``path``."""
        answer = httpx.post(f"{self.url}/admin/{path}", json=body, trust_env=False, timeout=ADMIN_TIMEOUT_S)
        answer.raise_for_status()
        return answer.json()

    def counted(self) -> dict[str, int]:
        """Preemptions and migrations so far."""
        return {
            "preemptions": sum(row["preemptions_total"] for row in self.ask("instances")["data"]),
            "migrations": self.ask("status")["migrations_committed"],
        }

    def placed(self, request_id: str) -> str:
        """The instance that a request was first placed on."""
        decisions = self.ask(f"explain?request={request_id}")["data"]
        return str(next(one["instance_id"] for one in decisions if one["kind"] == "placed"))

    def moved(self, after: int) -> tuple[list[str], int]:
        """The request of every migration committed after that event, and the number of the last event."""
        moved: list[str] = []
        while page := self.ask(f"events?after={after}&limit={EVENTS_PAGE}")["data"]:
            ends = (event["fields"] for event in page if event["kind"] == "migration_ended")
            moved += [fields["request"] for fields in ends if fields["outcome"] == "committed"]
            after = page[-1]["sequence"]
        return moved, after

    def run(self, arrivals: Sequence[Arrival], seed: int) -> list[Streamed]:
        """Send every request at its time and wait for all answers. Raises LlumnixError if one fails."""
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port or 0
        rng = np.random.default_rng(seed)
        calls = []
        for number, arrival in enumerate(arrivals):
            prompt = rng.integers(*TOKEN_IDS, arrival.prompt_tokens).tolist()
            wish = {
                "ignore_eos": True,
                "stream_options": {"include_usage": True},
                "priority": arrival.execution_priority,
            }
            calls.append(completion_request(host, port, prompt, arrival.output_tokens, seed + number, **wish))
        began, clients = asyncio.run(_send(host, port, [a.at_s for a in arrivals], calls))
        answers = [_read(client, arrival, began) for client, arrival in zip(clients, arrivals, strict=True)]
        problems = sorted({answer.problem for answer in answers if answer.problem})
        if problems:
            raise LlumnixError(f"{sum(bool(one.problem) for one in answers)} answers failed: {problems[0]}")
        return answers


async def _send(
    host: str, port: int, times_s: Sequence[float], calls: Sequence[bytes]
) -> tuple[float, list[StreamingClient]]:
    loop = asyncio.get_running_loop()
    began = time.perf_counter()

    async def one(at_s: float, call: bytes) -> StreamingClient:
        await asyncio.sleep(began + at_s - time.perf_counter())
        _, client = await loop.create_connection(lambda: StreamingClient(call), host, port)
        await client.ended
        return client

    clients = await asyncio.gather(*(one(*pair) for pair in zip(times_s, calls, strict=True)))
    return began, list(clients)


def _read(client: StreamingClient, arrival: Arrival, began: float) -> Streamed:
    events, status = client.events()
    times: list[float] = []
    tokens, problem, done = 0, "" if status == 200 else f"HTTP {status}", False
    request_id = ""
    for at, event in events if status == 200 else ():
        if event == DONE_EVENT:
            done = True
            continue
        body = json.loads(event)
        if "error" in body:
            problem = body["error"]["message"]
        elif body["choices"]:
            times.append(at)
            request_id = body["id"]
        else:
            tokens = body["usage"]["completion_tokens"]
    if not problem and (not done or tokens != arrival.output_tokens):
        problem = f"{tokens} of {arrival.output_tokens} tokens, ended: {done}"
    first, last = (times[0], times[-1]) if times else (began, began)
    longest = max((later - earlier for earlier, later in pairwise(times)), default=0.0)
    at_s = (client.sent_at - began, first - began, last - began)
    chunks_s = tuple(at - began for at in times)
    return Streamed(arrival, *at_s, longest, tokens, problem, request_id, chunks_s)


def quantiles_ms(values_s: Sequence[float]) -> dict[str, float]:
    """Mean, P50, P95, P99 in milliseconds."""
    values = np.array(values_s) * 1e3
    names = ("p50", "p95", "p99")
    points = dict(zip(names, np.percentile(values, [50, 95, 99]), strict=True))
    return {name: round(float(value), 3) for name, value in {"mean": values.mean(), **points}.items()}
