"""Two instances of a small chat model on this machine, and requests that move between them while they stream.

Run it with `make demo`. It starts `llumnix serve`, then:
1. with all requests on one instance and nothing moving, streams a burst of chats: the reference;
2. streams the same burst again. All of it lands on one instance; then the other one is opened and the
   scheduler evens the load out, while this script orders further moves, as an operator would; when, goes by
   how long the reference took, so that it is neither over nor hardly begun on any machine;
3. compares every output with its reference and prints a table and one JSON object.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

REQUESTS = 16
KV_BLOCKS = 112  # per instance: the burst just fits one, which leaves the scheduler something to do
TOKENS = (48, 64, 80, 96)
START_TIMEOUT_S = 150.0
RUN_TIMEOUT_S = 120.0
RESUME_SHARE, COMMAND_SHARE = 0.2, 0.15  # of the time that the burst takes
TOKENS_LEFT_MIN = 16  # a request about to end is not worth an order

QUESTIONS = (
    "Why is the sky blue?",
    "Tell me a short story about a lighthouse.",
    "How does a bicycle stay upright?",
    "List three uses of a paper clip.",
    "What is a black hole?",
    "Explain photosynthesis to a child.",
    "Write a few lines about autumn rain.",
    "How do I boil an egg?",
)

console = Console(highlight=False)


@dataclass
class Chat:
    """One request and what became of it."""

    number: int
    question: str
    max_tokens: int
    request_id: str = ""
    tokens: list[str] = field(default_factory=list)
    usage_tokens: int = -1
    finish_reason: str = ""
    error: str = ""

    @property
    def completed(self) -> bool:
        return bool(self.finish_reason) and not self.error


def burst() -> list[Chat]:
    """The same requests every time."""
    return [
        Chat(number, QUESTIONS[number % len(QUESTIONS)], TOKENS[number % len(TOKENS)])
        for number in range(REQUESTS)
    ]


async def stream_chat(client: AsyncOpenAI, model: str, chat: Chat) -> None:
    """Stream one chat. Odd ones sample with a seed, even ones are greedy."""
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": chat.question}],
            max_tokens=chat.max_tokens,
            temperature=0.8 if chat.number % 2 else 0.0,
            seed=chat.number,
            logprobs=True,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            chat.request_id = chunk.id
            if chunk.usage is not None:
                chat.usage_tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if choice.logprobs is not None and choice.logprobs.content:
                    chat.tokens += [entry.token for entry in choice.logprobs.content]
                chat.finish_reason = choice.finish_reason or chat.finish_reason
    except Exception as error:  # a lost request is a result of this run, not its end
        chat.error = str(error)


@dataclass
class Observed:
    """What the operator's side of the demo saw while the burst ran."""

    step_ms: list[float] = field(default_factory=list)
    last_event: int = 0
    committed: int = 0
    failed: int = 0


async def watch(http: httpx.AsyncClient, seen: Observed) -> None:
    """Print the cluster's events as they happen, and note step times."""
    while True:
        for event in (await http.get("/admin/events", params={"after": seen.last_event})).json()["data"]:
            seen.last_event = event["sequence"]
            if event["kind"] == "migration_ended":
                moved = event["fields"]["outcome"] == "committed"
                seen.committed += moved
                seen.failed += not moved
            console.print(f"  [dim]{event['kind']:<18}[/dim] {event['text']}", soft_wrap=True)
        for row in (await http.get("/admin/instances")).json()["data"]:
            if row["running"]:
                seen.step_ms.append(row["step_ms"])
        await asyncio.sleep(0.2)


async def order_moves(http: httpx.AsyncClient, every_s: float) -> None:
    """An operator who moves the request with most left to say to the other instance, again and again."""
    while True:
        await asyncio.sleep(every_s)
        rows = (await http.get("/admin/requests")).json()["data"]
        running = [row for row in rows if row["status"] == "running" and row["output_tokens"] > 0]
        row = max(running, key=lambda row: row["max_tokens"] - row["output_tokens"], default=None)
        if row is None or row["max_tokens"] - row["output_tokens"] < TOKENS_LEFT_MIN:
            continue
        target = "i1" if row["instance_id"] == "i0" else "i0"
        console.print(f"[bold]$ llumnix migrate {row['request_id']} --to {target}[/bold]", soft_wrap=True)
        await http.post("/admin/migrate", json={"request_id": row["request_id"], "target_id": target})


async def run_burst(client: AsyncOpenAI, model: str) -> list[Chat]:
    chats = burst()
    async with asyncio.timeout(RUN_TIMEOUT_S), asyncio.TaskGroup() as tasks:
        for chat in chats:
            tasks.create_task(stream_chat(client, model, chat))
    return chats


@contextlib.asynccontextmanager
async def background(*jobs: "asyncio.Task[None]") -> AsyncIterator[None]:
    """Run jobs beside the block, and end them with it."""
    try:
        yield
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)


async def play(url: str) -> dict[str, object]:
    """The demo itself, against a serving cluster."""
    async with (
        httpx.AsyncClient(base_url=url, timeout=30.0) as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        console.rule("1. Reference: everything on i0, nothing moves")
        (await http.post("/admin/drain", json={"instance_id": "i1"})).raise_for_status()
        began = time.monotonic()
        reference = await run_burst(client, model)
        took_s = time.monotonic() - began
        console.print(f"{REQUESTS} chats in {took_s:.1f} s")

        console.rule("2. The same burst, moving")
        seen = Observed()
        seen.last_event = max(
            (event["sequence"] for event in (await http.get("/admin/events")).json()["data"]), default=0
        )
        moving = asyncio.create_task(run_burst(client, model))
        watching = asyncio.create_task(watch(http, seen))
        async with background(watching):
            await asyncio.sleep(RESUME_SHARE * took_s)
            console.print("[bold]$ llumnix resume i1[/bold]")
            (await http.post("/admin/resume", json={"instance_id": "i1"})).raise_for_status()
            ordering = asyncio.create_task(order_moves(http, COMMAND_SHARE * took_s))
            async with background(ordering):
                chats = await moving
            await asyncio.sleep(0.5)
        moves = (await http.get("/admin/moves")).json()["data"]
    return report(reference, chats, moves, seen)


def report(
    reference: list[Chat], chats: list[Chat], moves: list[dict[str, object]], seen: Observed
) -> dict[str, object]:
    """Print the table; return the summary."""
    table = Table(title="Each request, with the moves its client's frontend saw")
    for title in ("request", "question", "tokens", "moves", "longest gap", "same output"):
        table.add_column(title)
    identical = 0
    for before, chat in zip(reference, chats, strict=True):
        same = chat.completed and chat.tokens == before.tokens
        identical += same
        own = [move for move in moves if move["request_id"] == chat.request_id]
        gap = max((float(str(move["gap_ms"])) for move in own), default=0.0)
        table.add_row(
            chat.request_id[-8:],
            chat.question,
            str(len(chat.tokens)),
            str(len(own)),
            f"{gap:.0f} ms" if own else "",
            "yes" if same else chat.error or "NO",
        )
    console.print(table)
    downtimes = sorted(max(0.0, float(str(m["gap_ms"])) - float(str(m["usual_ms"]))) for m in moves)
    return {
        "requests": len(chats),
        "completed": sum(chat.completed for chat in chats),
        "lost": sum(not chat.completed for chat in chats),
        "duplicated_tokens": sum(max(0, len(chat.tokens) - chat.usage_tokens) for chat in chats),
        "migrations": seen.committed,
        "migrations_failed": seen.failed,
        "identical_outputs": identical,
        "downtime_ms_p50": round(percentile(downtimes, 0.50), 1),
        "downtime_ms_p99": round(percentile(downtimes, 0.99), 1),
        "decode_step_ms_p50": round(statistics.median(seen.step_ms), 1) if seen.step_ms else 0.0,
    }


def percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """`llumnix serve` as a child process, in order at both ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = shutil.which("llumnix", path=str(Path(sys.executable).parent)) or "llumnix"
    arguments = ("serve", "--model", "smollm2", "--instances", "2", "--kv-blocks", str(KV_BLOCKS))
    server = await asyncio.create_subprocess_exec(
        command, *arguments, "--port", str(port), start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(START_TIMEOUT_S), httpx.AsyncClient(base_url=url) as http:
            while True:
                if server.returncode is not None:
                    raise SystemExit(f"llumnix serve ended with status {server.returncode}")
                with contextlib.suppress(httpx.TransportError):
                    if (await http.get("/health")).status_code == 200:
                        break
                await asyncio.sleep(0.2)
        yield url
    finally:
        if server.returncode is None:
            os.kill(server.pid, signal.SIGINT)
            await server.wait()


async def main() -> int:
    async with serving() as url:
        summary = await play(url)
    print(json.dumps(summary), flush=True)
    failed = (
        summary["lost"] or summary["duplicated_tokens"] or summary["identical_outputs"] != summary["requests"]
    )
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
