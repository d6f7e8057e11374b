"""``llumnix bench frontend``: many streaming clients on a real cluster of simulated engines, through one
frontend.

Starts ``llumnix serve --engine simulated`` as a process of its own and lets raw clients stream from it. Every
stream is compared with the tokens the simulated model must give, so a lost or doubled token is seen. The
engine's own time is known (its mean step), so what is left of the clients' waiting is what the system around
it adds:

- between tokens: a chunk's gap, less one step for each of its tokens;
- to the first token: a busy engine alone needs the rest of the step that is running and one more, 1.5 steps
  on
  average and at most 2, so p50 is taken less 1.5 steps and p99 less 2; an idle one needs one step.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import httpx
from rich.console import Console
from rich.table import Table

from llumnix.bench.frontend_client import Heard, completion_request, run_clients
from llumnix.bench.machine import describe_machine
from llumnix.cli.output_paths import OUTPUT_FILE
from llumnix.core.errors import LlumnixError
from llumnix.instance.simulated_executor import simulated_token
from llumnix.runtime.launch import terminated_as_interrupt

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
PROMPT_TOKENS = 32
BLOCK_SIZE = 16
SAMPLE_S = 0.5
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Result:
    """One run. ``step_ms`` is the engines' own mean step while all clients streamed, as are ``tokens_per_s``
    and the CPU shares (1.0 is one core). ``gap``: between two chunks of a stream, per token."""

    clients: int
    completed: int
    errors: int
    lost_or_wrong_streams: int
    tokens: int
    tokens_per_s: float
    chunks_per_s: float
    tokens_per_chunk: float
    step_ms: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    added_ttft_ms_p50: float
    added_ttft_ms_p99: float
    gap_ms_p50: float
    gap_ms_p99: float
    added_gap_ms_p50: float
    added_gap_ms_p99: float
    migrations: int
    frontend_rss_mib: float
    frontend_cpu: float
    clients_cpu: float
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    step_ms: float
    frontend_cpu_s: float
    clients_cpu_s: float
    rss_mib: float


@contextmanager
def served_cluster(options: Sequence[str]) -> Iterator[tuple[str, int]]:
    """``llumnix serve`` with these options in a process of its own: (its URL, the frontend's process id).
    Stopped like by Ctrl-C, also when this process is told to end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [sys.executable, "-m", "llumnix.cli.main", "serve", "--port", str(port)]
    process = subprocess.Popen([*arguments, *options], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        with terminated_as_interrupt():
            url = f"http://127.0.0.1:{port}"
            _await_health(url, process)
            yield url, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_health(url: str, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise LlumnixError(f"the cluster did not start: serve ended with status {process.returncode}")
        try:
            if httpx.get(f"{url}/health", trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise LlumnixError(f"the cluster did not start within {START_TIMEOUT_S:.0f} s")


def measure(url: str, pid: int, clients: int, tokens: int, ramp_s: float) -> Result:
    """One run: ``clients`` streams of ``tokens`` each, begun within ``ramp_s``."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 0
    prompt = [65 + number % 26 for number in range(PROMPT_TOKENS)]
    calls = [completion_request(host, port, prompt, tokens, seed) for seed in range(clients)]
    committed = _ask(url, "status")["migrations_committed"]
    heard_raw, samples = asyncio.run(_run(url, pid, host, port, calls, ramp_s))
    texts = [
        bytes(simulated_token(seed, PROMPT_TOKENS + n) for n in range(tokens)).decode()
        for seed in range(clients)
    ]
    heard = [client.heard(text) for client, text in zip(heard_raw, texts, strict=True)]
    moved = _ask(url, "status")["migrations_committed"] - committed
    return _result(heard, samples, moved)


async def _run(
    url: str, pid: int, host: str, port: int, calls: Sequence[bytes], ramp_s: float
) -> tuple[list[Any], list[_Sample]]:
    samples: list[_Sample] = []

    async def sample() -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
            while True:
                rows = (await http.get(f"{url}/admin/instances")).json()["data"]
                busy = [row["step_ms"] for row in rows if row["running"]]
                samples.append(
                    _Sample(
                        at=time.perf_counter(),
                        step_ms=sum(busy) / len(busy) if busy else 0.0,
                        frontend_cpu_s=_cpu_s(pid),
                        clients_cpu_s=time.process_time(),
                        rss_mib=_rss_mib(pid),
                    )
                )
                await asyncio.sleep(SAMPLE_S)

    async with asyncio.TaskGroup() as group:
        sampling = group.create_task(sample())
        clients = await run_clients(host, port, calls, ramp_s)
        sampling.cancel()
    return clients, samples


def _result(heard: Sequence[Heard], samples: Sequence[_Sample], moved: int) -> Result:
    good = [one for one in heard if not one.problem]
    if not good:
        raise LlumnixError(f"no stream was complete; the first: {heard[0].problem}")
    begin = max(one.chunks[0][0] for one in good)
    end = max(begin + SAMPLE_S, min(one.ended_at for one in good))
    within = [one for one in samples if begin <= one.at <= end] or list(samples[-1:])
    span_s = within[-1].at - within[0].at or 1.0
    step_ms = sum(one.step_ms for one in within) / len(within)
    usual_steps, most_steps = (1.5, 2.0) if len(heard) > 1 else (1.0, 1.0)
    ttft_ms = sorted((one.chunks[0][0] - one.sent_at) * 1e3 for one in good)
    gaps = [
        ((at - before) * 1e3, count)
        for one in good
        for (before, _), (at, count) in zip(one.chunks, one.chunks[1:], strict=False)
        if begin <= at <= end
    ]
    per_token = sorted(gap / count for gap, count in gaps)
    added = sorted(gap - count * step_ms for gap, count in gaps)
    window = [(at, count) for one in good for at, count in one.chunks if begin <= at <= end]
    in_window = sum(count for _, count in window)
    return Result(
        clients=len(heard),
        completed=len(good),
        errors=sum(one.problem.startswith(("HTTP", "error")) for one in heard),
        lost_or_wrong_streams=sum("tokens, right" in one.problem for one in heard),
        tokens=sum(count for one in good for _, count in one.chunks),
        tokens_per_s=round(in_window / (end - begin), 1),
        chunks_per_s=round(len(window) / (end - begin), 1),
        tokens_per_chunk=round(in_window / max(1, len(window)), 3),
        step_ms=round(step_ms, 3),
        ttft_ms_p50=_quantile(ttft_ms, 0.5),
        ttft_ms_p99=_quantile(ttft_ms, 0.99),
        added_ttft_ms_p50=round(_quantile(ttft_ms, 0.5) - usual_steps * step_ms, 3),
        added_ttft_ms_p99=round(_quantile(ttft_ms, 0.99) - most_steps * step_ms, 3),
        gap_ms_p50=_quantile(per_token, 0.5),
        gap_ms_p99=_quantile(per_token, 0.99),
        added_gap_ms_p50=_quantile(added, 0.5),
        added_gap_ms_p99=_quantile(added, 0.99),
        migrations=moved,
        frontend_rss_mib=round(max(one.rss_mib for one in samples), 1),
        frontend_cpu=round((within[-1].frontend_cpu_s - within[0].frontend_cpu_s) / span_s, 3),
        clients_cpu=round((within[-1].clients_cpu_s - within[0].clients_cpu_s) / span_s, 3),
        problems=tuple(sorted({one.problem for one in heard if one.problem}))[:5],
    )


def _ask(url: str, path: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{url}/admin/{path}", trust_env=False, timeout=30).json()
    return answer


def _quantile(ordered: Sequence[float], share: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else 0.0


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


def _rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES / 2**20


@click.command("frontend")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Write the result here.")
@click.option("--clients", multiple=True, type=click.IntRange(min=1), default=(1, 1000), show_default=True)
@click.option("--instances", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--tokens", type=click.IntRange(min=2), default=200, show_default=True, help="Tokens of each stream."
)
@click.option("--step-ms", type=float, default=100.0, show_default=True, help="The engines' decode step.")
@click.option(
    "--ramp-s", type=float, default=5.0, show_default=True, help="All clients begin within this time."
)
def command(
    json_file: Path | None,
    clients: tuple[int, ...],
    instances: int,
    tokens: int,
    step_ms: float,
    ramp_s: float,
) -> None:
    """Many streaming clients on a simulated cluster: errors, lost tokens, added latency, throughput,
    memory."""
    machine = describe_machine()
    most = max(clients)
    batch = -(-most // instances) * 2  # room for an uneven spread
    options = {
        "engine": "simulated",
        "instances": instances,
        "batch-max": batch,
        "waiting-max": most,
        "requests-max": 2 * most,
        "step-tokens-max": batch + 64 * PROMPT_TOKENS,
        "kv-blocks": batch * (-(-(PROMPT_TOKENS + tokens) // BLOCK_SIZE) + 1),
        "block-size": BLOCK_SIZE,
        "simulated-step-ms": step_ms,
        "simulated-token-ms": 0.0,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with served_cluster(flags) as (url, pid):
        measure(
            url, pid, 4 * instances, 4, 0.0
        )  # connections inside the cluster are made with the first requests
        results = [measure(url, pid, count, tokens, ramp_s if count > 1 else 0.0) for count in clients]
    report = {
        "benchmark": "frontend",
        "config": options | {"tokens": tokens, "prompt_tokens": PROMPT_TOKENS, "ramp_s": ramp_s},
        "machine": machine,
        "results": [asdict(result) for result in results],
    }
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    _show(results)
    if any(result.completed < result.clients for result in results):
        problems = [problem for result in results for problem in result.problems]
        raise LlumnixError(f"streams were not complete: {'; '.join(problems)}")


def _show(results: Sequence[Result]) -> None:
    table = Table(title="one frontend, simulated engines")
    for title in ("", *[f"{result.clients} clients" for result in results]):
        table.add_column(title, justify="right" if title else "left")
    for name in Result.__dataclass_fields__:
        if name not in ("clients", "problems"):
            table.add_row(name.replace("_", " "), *[str(getattr(result, name)) for result in results])
    Console().print(table)
