"""Two hosts, as far as one machine can play them: two network namespaces joined by a cable, each with its own
process ids and Ray node. KV moves over the network, and the cable is cut while clients stream."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from llumnix.instance.simulated_executor import simulated_token

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROMPT = "Two hosts and one cable. "
TOKENS = 700
STREAMS = 6
PORT = 8555
URL = f"http://127.0.0.1:{PORT}"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def can_make_hosts() -> bool:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    made = subprocess.run(["ip", "netns", "add", f"llumnix-probe-{os.getpid()}"], capture_output=True)
    if made.returncode:
        return False
    subprocess.run(["ip", "netns", "del", f"llumnix-probe-{os.getpid()}"], check=True)
    return True


pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not can_make_hosts(), reason="needs root and network namespaces"),
]


class Hosts:
    """Two namespaces and what runs in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = tuple(f"llumnix-{letter}-{os.getpid()}" for letter in "ab")
        self.environment = os.environ | {
            "HOME": str(folder),
            "RAY_AUTH_MODE": "token",
            "LLUMNIX_URL": URL,
            "PYTHONPATH": str(ROOT),
        }

    def __enter__(self) -> "Hosts":
        for name in self.names:
            self.ip("netns", "add", name)
        cable = [f"ll{letter}{os.getpid()}" for letter in "ab"]
        self.ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for name, end, address in zip(self.names, cable, ADDRESSES, strict=True):
            self.ip("link", "set", end, "netns", name)
            self.ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            self.ip("-n", name, "link", "set", "lo", "up")
            self.ip("-n", name, "link", "set", end, "up")
        self.cable_end = cable[0]
        return self

    def __exit__(self, *ended: object) -> None:
        for name in self.names:
            self.ip("netns", "del", name)

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def plug(self, state: str) -> None:
        """Cut (down) or join (up) the cable."""
        self.ip("-n", self.names[0], "link", "set", self.cable_end, state)

    def start(self, host: int, log: str, *command: str | Path) -> "subprocess.Popen[bytes]":
        """Run a command on a host, in a process-id namespace that ends with it."""
        inside = ["ip", "netns", "exec", self.names[host], "unshare", "-pf", "--kill-child", "--mount-proc"]
        with (self.folder / log).open("wb") as output:
            return subprocess.Popen(
                [*inside, *map(str, command)],
                stdout=output,
                stderr=output,
                env=self.environment,
                cwd=self.folder,
            )

    def run(self, *command: str | Path) -> str:
        """Run a command on host 0 and return what it prints."""
        inside = ["ip", "netns", "exec", self.names[0]]
        done = subprocess.run(
            [*inside, *map(str, command)],
            capture_output=True,
            env=self.environment,
            cwd=self.folder,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def rows(self, what: str) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = json.loads(self.run(BIN / "llumnix", what, "--json"))
        return rows


def until(what: Callable[[], object], seconds: float = 90.0) -> None:
    give_up_at = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.2)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """A cluster of one instance on each host, serving on the first."""
    with ExitStack() as stack:
        hosts = stack.enter_context(Hosts(tmp_path))
        hosts.run(BIN / "ray", "get-auth-token", "--generate")

        def begin(host: int, log: str, *command: str | Path) -> None:
            process = hosts.start(host, log, *command)
            stack.callback(process.wait)
            stack.callback(process.kill)

        node = "--num-cpus 1 --node-ip-address"
        head, joined = f"{ADDRESSES[0]}:6379", tmp_path / "node.log"
        joined.touch()
        # Ray and who joins it share process ids, as on one host.
        serve = f"""
            {BIN}/ray start --head --port=6379 --include-dashboard=false {node} {ADDRESSES[0]}
            until grep -q "block forever" {joined}; do sleep 0.2; done
            exec {BIN}/llumnix serve --engine simulated --instances 2 \\
                --ray-address {head} --bind-host node --port {PORT}
        """
        begin(0, "serve.log", "bash", "-ec", serve)
        until(lambda: "Ray runtime started" in (tmp_path / "serve.log").read_text())
        begin(1, "node.log", "bash", "-ec", f"{BIN}/ray start --address={head} {node} {ADDRESSES[1]} --block")
        until(lambda: URL in (tmp_path / "serve.log").read_text())
        yield hosts


def test_a_request_moves_between_hosts_and_outlives_a_cut_cable(hosts: Hosts) -> None:
    at = {row["instance_id"]: str(row["address"]) for row in hosts.rows("instances")}
    assert sorted(address.split("/")[2].split(":")[0] for address in at.values()) == list(ADDRESSES)

    client = hosts.start(
        0, "client.json", sys.executable, Path(__file__).with_name("two_hosts_client.py"), URL, PROMPT,
        str(TOKENS), str(STREAMS),
    )  # fmt: skip
    until(lambda: len(hosts.rows("requests")) == STREAMS)
    moved = next(row for row in hosts.rows("requests") if row["status"] == "running")
    target = next(name for name in at if name != moved["instance_id"])
    outcome = json.loads(
        hosts.run(BIN / "llumnix", "migrate", str(moved["request_id"]), "--to", target, "--json")
    )
    assert outcome["outcome"] == "committed"
    assert outcome["kv_bytes"] > 0

    cut_off = next(name for name, address in at.items() if ADDRESSES[1] in address)
    assert any(row["instance_id"] == cut_off for row in hosts.rows("requests"))
    hosts.plug("down")
    assert client.wait(timeout=120) == 0
    outputs = json.loads((hosts.folder / "client.json").read_text())
    for seed, output in enumerate(outputs):
        expected = bytes(simulated_token(seed, len(PROMPT) + n) for n in range(TOKENS)).decode()
        assert output["text"] == expected

    hosts.plug("up")
    until(lambda: all(row["state"] == "serving" for row in hosts.rows("instances")))
    until(lambda: all(row["used_blocks"] == 0 for row in hosts.rows("instances")))
