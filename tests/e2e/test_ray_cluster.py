"""`llumnix serve` as users run it: Ray, HTTP, the command line, the openai client, and processes that get
killed.

One simulated cluster serves all tests of this file; they run in order and leave it as they found it.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI

from llumnix.instance.simulated_executor import simulated_token

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
LLUMNIX = str(Path(sys.executable).with_name("llumnix"))
PROMPT = "A prompt of some length, to fill a few blocks of KV. "


def descendants(pid: int) -> set[int]:
    """Process ids below ``pid``, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    below: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in below | {pid}} - below:
        below |= more
    return below


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Served:
    """A running `llumnix serve`."""

    def __init__(self, port: int, process: "subprocess.Popen[str]") -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = process
        self.ray_address = ""

    def cli(self, *arguments: str, fails: bool = False) -> str:
        """Run an admin command; its output, or its error if it is to fail."""
        done = subprocess.run(
            [LLUMNIX, *arguments, "--url", self.url], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    def rows(self, what: str) -> list[dict[str, object]]:
        rows = json.loads(self.cli(what, "--json"))
        assert isinstance(rows, list)
        return rows

    def wait_serving(self, instances: int) -> None:
        give_up_at = time.monotonic() + 60
        while sum(row["state"] == "serving" for row in self.rows("instances")) != instances:
            assert time.monotonic() < give_up_at
            time.sleep(0.2)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                *(LLUMNIX, "serve", "--engine", "simulated", "--simulated-step-ms", "10", "--instances", "2"),
                *("--port", str(port), "--pairing-policy", "drain"),
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
    served = Served(port, process)
    try:
        give_up_at = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up_at, log.read_text()
            try:
                if httpx.get(f"{served.url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        served.ray_address = log.read_text().strip().rpartition(" ")[2]
        yield served
        below = descendants(process.pid)
        assert below
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, log.read_text()
        time.sleep(1.0)
        left = {pid: title(pid) for pid in below if title(pid)}
        assert not left, f"left running: {left}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


async def chat(client: AsyncOpenAI, seed: int, tokens: int) -> str:
    stream = await client.completions.create(
        model="simulated", prompt=PROMPT, max_tokens=tokens, seed=seed, stream=True
    )
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


def expected(seed: int, tokens: int) -> str:
    return bytes(simulated_token(seed, len(PROMPT) + index) for index in range(tokens)).decode()


async def burst(
    served: Served, count: int, tokens: int, disturb: "asyncio.Future[None] | None" = None
) -> None:
    """So many streams at once, each complete and exact, whatever ``disturb`` does meanwhile."""
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        texts = asyncio.gather(*(chat(client, seed, tokens) for seed in range(count)))
        if disturb is not None:
            await disturb
        assert await texts == [expected(seed, tokens) for seed in range(count)]


def test_the_second_turn_of_a_conversation_finds_the_first_in_host_memory(served: Served) -> None:
    """As configured for nobody: no flag of the server, no word of the client."""
    example = ROOT / "examples" / "second_turn.py"
    arguments = ["--url", served.url, "--conversations", "2", "--words", "40"]
    done = subprocess.run(
        [sys.executable, str(example), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["second_turn_ms"]) == 2
    totals = [row["swap"] for row in served.rows("instances")]
    assert sum(swap["prefix_hits"] for swap in totals if isinstance(swap, dict)) >= 2


def test_the_command_line_shows_and_moves(served: Served) -> None:
    assert [row["instance_id"] for row in served.rows("instances")] == ["i0", "i1"]
    assert "serving" in served.cli("instances")

    async def play() -> None:
        async def order() -> None:
            await asyncio.sleep(1.0)
            row = (await asyncio.to_thread(served.rows, "requests"))[0]
            target = "i1" if row["instance_id"] == "i0" else "i0"
            moved = await asyncio.to_thread(served.cli, "migrate", str(row["request_id"]), "--to", target)
            assert "committed" in moved
            again = await asyncio.to_thread(
                lambda: served.cli("migrate", str(row["request_id"]), "--to", target, fails=True)
            )
            assert "already" in again
            assert len(again.strip().splitlines()) == 1

        await burst(served, 4, 600, asyncio.ensure_future(order()))

    asyncio.run(play())
    assert "nobody" in served.cli("migrate", "nobody", "--to", "i0", fails=True)
    assert "i9" in served.cli("drain", "i9", fails=True)
    assert "draining" in served.cli("drain", "i0")
    assert "serving" in served.cli("resume", "i0")
    assert "migration_ended" in served.cli("events")
    status = json.loads(served.cli("status", "--json"))
    assert status["migrations_committed"] >= 1


def test_a_killed_instance_is_not_noticed_by_clients_and_comes_back(served: Served) -> None:
    async def kill() -> None:
        await asyncio.sleep(1.0)
        rows = await asyncio.to_thread(served.rows, "instances")
        victim = max(rows, key=lambda row: int(str(row["running"])))
        assert int(str(victim["running"])) > 0
        os.kill(int(str(victim["pid"])), signal.SIGKILL)

    async def play() -> None:
        await burst(served, 10, 300, asyncio.ensure_future(kill()))

    asyncio.run(play())
    served.wait_serving(2)
    assert "instance_down" in served.cli("events")


def test_a_killed_manager_comes_back_and_serving_never_stops(served: Served) -> None:
    before = json.loads(served.cli("status", "--json"))["manager_incarnation"]

    async def kill() -> None:
        await asyncio.sleep(0.5)
        managers = [pid for pid in descendants(served.process.pid) if "ManagerActor" in title(pid)]
        assert len(managers) == 1
        os.kill(managers[0], signal.SIGKILL)
        await asyncio.sleep(0.3)
        await burst(served, 6, 50)

    async def play() -> None:
        await burst(served, 6, 300, asyncio.ensure_future(kill()))

    asyncio.run(play())
    give_up_at = time.monotonic() + 60
    while True:
        answer = httpx.get(f"{served.url}/admin/status", timeout=60)
        if answer.status_code == 200 and answer.json()["serving"] == 2:
            break
        assert answer.status_code in (200, 503)
        assert time.monotonic() < give_up_at
        time.sleep(0.2)
    assert answer.json()["manager_incarnation"] != before
    asyncio.run(burst(served, 4, 30))


def test_the_cluster_grows_and_shrinks_without_losing_a_request(served: Served) -> None:
    async def scale() -> None:
        await asyncio.sleep(0.3)
        await asyncio.to_thread(served.cli, "scale", "3")
        assert len(await asyncio.to_thread(served.rows, "instances")) >= 3
        await asyncio.to_thread(served.cli, "scale", "2")

    async def play() -> None:
        await burst(served, 6, 1500, asyncio.ensure_future(scale()))

    asyncio.run(play())
    served.wait_serving(2)
    assert "instances must be within" in served.cli("scale", "100000", fails=True)


class Orders:
    """Orders that last, as an administrator gives them while requests run."""

    def __init__(self, served: Served, http: httpx.AsyncClient) -> None:
        self.served = served
        self.http = http

    def scale(self, instances: int) -> "asyncio.Task[httpx.Response]":
        return asyncio.create_task(self.http.post("/admin/scale", json={"instances": instances}))

    async def states(self) -> dict[str, tuple[str, int]]:
        """State and pid of every instance that is not down; nothing while the manager is away."""
        answer = await self.http.get("/admin/instances")
        rows = answer.json()["data"] if answer.is_success else ()
        return {row["instance_id"]: (row["state"], row["pid"]) for row in rows if row["state"] != "down"}

    async def until(self, wanted: list[str]) -> dict[str, tuple[str, int]]:
        """Wait until the instances are in these states, in any order."""
        give_up_at = time.monotonic() + 60
        while True:
            found = await self.states()
            if sorted(state for state, _ in found.values()) == wanted:
                return found
            assert time.monotonic() < give_up_at, found
            await asyncio.sleep(0.05)

    async def shrinking(self) -> tuple["asyncio.Task[httpx.Response]", str, int]:
        """Begin to scale down to one: the order's answer to be, and the instance that goes with its pid."""
        order = self.scale(1)
        found = await self.until(["draining", "serving"])
        assert not order.done()
        return order, *next((name, pid) for name, (state, pid) in found.items() if state == "draining")


def with_orders(served: Served, play: Callable[[Orders], Awaitable[None]]) -> None:
    """Give orders while six requests run, which pairing policy none keeps where they are."""

    async def ordered() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
            while (await http.get("/admin/status")).json()["running"] < 6:
                await asyncio.sleep(0.05)
            await play(Orders(served, http))

    async def both() -> None:
        await burst(served, 6, 300, asyncio.ensure_future(ordered()))

    served.cli("policy", "set", "pairing", "none")
    asyncio.run(both())
    served.cli("policy", "set", "pairing", "drain")


def test_an_instance_on_its_way_out_is_taken_back(served: Served) -> None:
    """Also: every question is answered meanwhile."""

    async def play(orders: Orders) -> None:
        before = await orders.states()
        down, leaving, _ = await orders.shrinking()
        assert (await orders.scale(2)).status_code == 200
        assert await orders.states() == before
        called_off = await down
        assert called_off.status_code == 409 and "taken back" in called_off.text
        down, leaving, _ = await orders.shrinking()
        await orders.http.post("/admin/resume", json={"instance_id": leaving})
        assert (await down).status_code == 409
        assert await orders.states() == before
        down, leaving, _ = await orders.shrinking()
        again = orders.scale(1)
        assert [(await order).status_code for order in (again, down)] == [200, 200]
        assert leaving not in await orders.until(["serving"])

    with_orders(served, play)
    served.cli("scale", "2")


def test_an_instance_that_dies_on_its_way_out_stays_away(served: Served) -> None:
    async def play(orders: Orders) -> None:
        down, leaving, pid = await orders.shrinking()
        os.kill(pid, signal.SIGKILL)
        assert (await down).status_code == 200
        assert leaving not in await orders.until(["serving"])

    with_orders(served, play)
    assert "is not started again" in served.cli("events")
    served.cli("scale", "2")


def test_a_manager_that_comes_back_goes_on_with_a_drain(served: Served) -> None:
    async def play(orders: Orders) -> None:
        down, leaving, _ = await orders.shrinking()
        [manager] = [pid for pid in descendants(served.process.pid) if "ManagerActor" in title(pid)]
        os.kill(manager, signal.SIGKILL)
        assert (await down).status_code == 503
        assert leaving not in await orders.until(["serving"])

    with_orders(served, play)
    assert "goes on being emptied" in served.cli("events")
    served.cli("scale", "2")


def test_it_grows_under_load_and_shrinks_after_it_by_itself(served: Served) -> None:
    """With a spare of a hundred typical changes whatever runs makes it grow; without, it soon shrinks."""
    settings = ("scale_spare=100", "scale_horizon_s=1", "scale_cooldown_s=2", "scale_instances_min=2")
    given = [part for one in (*settings, "scale_instances_max=3") for part in ("--setting", one)]

    async def play() -> None:
        grown = asyncio.ensure_future(asyncio.to_thread(served.wait_serving, 3))
        await burst(served, 6, 1500, grown)

    served.cli("policy", "set", "scaling", "demand", *given)
    asyncio.run(play())
    served.cli("policy", "set", "scaling", "demand", "--setting", "scale_spare=0")
    served.wait_serving(2)
    served.cli("policy", "set", "scaling", "none")
    events = served.cli("events")
    assert "2 to 3 instances" in events and "3 to 2 instances" in events, events


def test_the_ray_api_example_runs(served: Served) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "ray_api.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "RAY_ADDRESS": served.ray_address, "RAY_AUTH_MODE": "token"},
    )
    assert done.returncode == 0, done.stderr
    assert "outcome=<MigrationOutcome.COMMITTED: 'committed'>" in done.stdout
