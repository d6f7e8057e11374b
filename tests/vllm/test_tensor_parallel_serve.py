"""`llumnix serve --engine vllm --tensor-parallel 2` as users run it: devices reserved in Ray, ranks below the
process of the instance, and nothing left of any of them, however it ends. One cluster, whose story the tests
tell in order."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
from openai import OpenAI
from shared_memory import shared_by
from small_llama import small_llama
from test_tensor_parallel import children, runs, unnamed

from llumnix.instance.model_loader import resolve_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

LLUMNIX = [sys.executable, "-m", "llumnix.cli.main"]
COMMAND = [
    *(*LLUMNIX, "serve", "--engine", "vllm", "--dtype", "float32"),
    *("--port", "0", "--tensor-parallel", "2", "--instances", "2", "--kv-blocks", "100"),
    *("--max-model-len", "512", "--staging-gib", "0.02", "--engine-arg", "enforce_eager=true"),
    *("--engine-arg", "block_size=32"),
]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
WAIT_S = 120.0
RESERVED = """
import sys, ray
from llumnix.runtime.reservations import reserved_ids
ray.init(address=sys.argv[1], namespace="llumnix", log_to_driver=False)
for line in sys.stdin:
    print(*reserved_ids(), flush=True)
"""


@dataclass
class Served:
    """A cluster, the process that serves it, and one that asks Ray for reservations."""

    process: subprocess.Popen[str]
    model: Path
    url: str
    asker: subprocess.Popen[str]

    @property
    def reserved(self) -> list[str]:
        """For whom devices are."""
        asked, told = piped(self.asker.stdin), piped(self.asker.stdout)
        asked.write("\n")
        asked.flush()
        return told.readline().split()

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*LLUMNIX, *arguments, "--url", self.url], capture_output=True, text=True, timeout=WAIT_S
        )

    def serving(self) -> dict[str, int]:
        """Process ids of instances that serve; none while the manager is away."""
        done = self.cli("instances", "--json")
        rows = json.loads(done.stdout) if done.returncode == 0 else []
        return {row["instance_id"]: row["pid"] for row in rows if row["state"] == "serving"}

    def say(self) -> str:
        client = OpenAI(base_url=f"{self.url}/v1", api_key="none")
        answer = client.completions.create(
            model=str(self.model), prompt="Once", max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 8
        return answer.choices[0].text


def piped(end: IO[str] | None) -> IO[str]:
    assert end is not None
    return end


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("served")
    small_llama(folder, vocabulary=49152)
    for name in TOKENIZER:
        if (resolve_model("smollm2") / name).is_file():
            shutil.copy(resolve_model("smollm2") / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    process = subprocess.Popen(
        [*COMMAND, "--model", str(model)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    everything = set[int]()
    try:
        line = piped(process.stdout).readline()
        assert " on 2 instances: " in line, line
        url, ray_address = line.split(": ", 1)[1].split("/v1, Ray ")
        with subprocess.Popen(
            [sys.executable, "-c", RESERVED, ray_address.strip()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"RAY_AUTH_MODE": "token"},
        ) as asker:
            yield Served(process, model, url, asker)
        everything = below(process.pid)
        assert unnamed(everything)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0
    assert everything and not left_of(everything)


def wait_for(met: Callable[[], Any]) -> Any:
    give_up_at = time.monotonic() + WAIT_S
    while not (found := met()):
        assert time.monotonic() < give_up_at
        time.sleep(0.2)
    return found


def below(pid: int) -> set[int]:
    found = children(pid)
    return found.union(*(below(child) for child in found))


def left_of(pids: set[int]) -> set[int]:
    """Those that have not ended within a while."""
    give_up_at = time.monotonic() + 20
    while (left := {pid for pid in pids if runs(pid)}) and time.monotonic() < give_up_at:
        time.sleep(0.1)
    return left


def test_instances_of_two_ranks_serve_on_what_is_reserved(served: Served) -> None:
    assert served.say()
    assert served.reserved == ["i0", "i1"]
    for pid in served.serving().values():
        assert sum(map(is_rank, below(pid))) == 2


def test_a_restarted_manager_adopts_them_and_scales_one_away(served: Served) -> None:
    before = served.serving()
    [manager] = [pid for pid in below(served.process.pid) if "ManagerActor" in title(pid)]
    os.kill(manager, signal.SIGKILL)
    wait_for(lambda: not runs(manager) and served.serving() == before)
    assert served.reserved == ["i0", "i1"]
    parts = {name: {pid} | below(pid) for name, pid in before.items()}
    assert all(unnamed(pids) for pids in parts.values())
    done = served.cli("scale", "1")
    assert done.returncode == 0, done.stderr
    [stays] = served.serving()
    [goes] = before.keys() - {stays}
    assert not left_of(parts[goes]) and all(runs(pid) for pid in parts[stays])
    assert served.reserved == [stays]
    assert served.say()


def test_an_instance_that_lost_a_rank_leaves_nothing_and_is_started_again(served: Served) -> None:
    [(name, pid)] = served.serving().items()
    said, parts = served.say(), {pid} | below(pid)
    assert unnamed(parts)
    os.kill(max(filter(is_rank, parts)), signal.SIGKILL)
    assert not left_of(parts)
    wait_for(lambda: served.serving() not in ({}, {name: pid}))  # nobody may have noticed yet
    [again] = served.serving()
    assert again == name
    assert served.reserved == [name]
    assert served.say() == said


def test_ranks_that_do_not_start_leave_a_line_and_nothing_running(served: Served) -> None:
    [(name, pid)] = served.serving().items()
    before, shared = below(pid), set[str]()
    broken = served.model / "broken"
    broken.write_bytes(b"no weights")
    broken.replace(served.model / "model.safetensors")
    ordered = subprocess.Popen(
        [*LLUMNIX, "scale", "2", "--url", served.url], stderr=subprocess.PIPE, text=True
    )
    while ordered.poll() is None:
        workers = set(filter(is_rank, below(served.process.pid))) - before
        shared |= shared_by(workers)
        time.sleep(0.1)
    line = piped(ordered.stderr).read().strip()
    assert ordered.returncode == 1 and len(line.splitlines()) == 1, line
    assert "vLLM did not start: " in line and "header" in line
    assert not left_of(set(filter(is_rank, below(served.process.pid))) - before)
    assert shared and not shared & set(os.listdir("/dev/shm"))
    assert served.reserved == [name] and served.say()


def test_degrees_that_do_not_fit_are_refused_before_anything_starts(model: Path) -> None:
    for arguments, reason in (
        (
            ["--tensor-parallel", "3", "--model", str(model)],
            "tensor_parallel 3 does not divide the model's 8",
        ),
        (["--engine", "torch", "--model", str(model)], "tensor_parallel needs engine vllm"),
    ):
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and reason in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def is_rank(pid: int) -> bool:
    """vLLM gives its ranks a title, which fails where their environment has changed at its beginning; then
    they are known by how they were started."""
    return any(mark in title(pid) for mark in ("VLLM::Worker", "--multiprocessing-fork"))


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""
