"""`llumnix serve --engine vllm --tensor-parallel 2` as users run it: devices reserved in Ray, ranks below the
process of the instance, and nothing left of any of them, however it ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from openai import OpenAI
from shared_memory import shared_by
from small_llama import small_llama
from test_tensor_parallel import children, runs

from llumnix.instance.model_loader import resolve_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

COMMAND = [
    *(sys.executable, "-m", "llumnix.cli.main", "serve", "--engine", "vllm", "--dtype", "float32"),
    *("--port", "0", "--tensor-parallel", "2", "--instances", "1", "--kv-blocks", "100"),
    *("--max-model-len", "512", "--staging-gib", "0.02", "--engine-arg", "enforce_eager=true"),
    *("--engine-arg", "block_size=32"),
]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
RESERVED = """
import sys, ray
from llumnix.runtime.reservations import reserved_ids
ray.init(address=sys.argv[1], namespace="llumnix", log_to_driver=False)
print("reserved", reserved_ids())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("served")
    small_llama(folder, vocabulary=49152)
    for name in TOKENIZER:
        if (resolve_model("smollm2") / name).is_file():
            shutil.copy(resolve_model("smollm2") / name, folder / name)
    return folder


def below(pid: int) -> set[int]:
    found = children(pid)
    return found.union(*(below(child) for child in found))


def with_workers(pid: int, count: int) -> set[int]:
    """All processes below this one, once so many workers of vLLM are seen among them."""
    give_up_at = time.monotonic() + 20
    while True:
        titles = {one: title(one) for one in below(pid)}
        if sum("VLLM::Worker" in text for text in titles.values()) == count:
            return set(titles)
        assert time.monotonic() < give_up_at, titles
        time.sleep(0.2)


def left_of(pids: set[int]) -> set[int]:
    """Those that have not ended within a while."""
    give_up_at = time.monotonic() + 20
    while (left := {pid for pid in pids if runs(pid)}) and time.monotonic() < give_up_at:
        time.sleep(0.1)
    return left


def test_an_instance_of_two_ranks_serves_and_leaves_nothing(model: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--model", str(model)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert " on 1 instances: " in line, line
        url, ray_address = line.split(": ", 1)[1].split(", Ray ")
        client = OpenAI(base_url=url, api_key="none")
        answer = client.completions.create(model=str(model), prompt="Once", max_tokens=8, temperature=0)
        assert answer.usage is not None and answer.usage.completion_tokens == 8
        told = subprocess.run(
            [sys.executable, "-c", RESERVED, ray_address.strip()],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"RAY_AUTH_MODE": "token"},
        )
        assert "reserved ['i0']" in told.stdout, told.stderr
        everything = with_workers(process.pid, 2)
        shared = shared_by(everything)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0
    assert not left_of(everything)
    assert shared and not shared & set(os.listdir("/dev/shm"))


def test_ranks_that_do_not_start_leave_a_line_and_nothing_running(model: Path) -> None:
    broken = model.with_name("broken")
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    before = {pid for pid in below(1) if "VLLM::" in title(pid)}
    done = subprocess.run([*COMMAND, "--model", str(broken)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "vLLM did not start: " in done.stderr and "header" in done.stderr
    assert not {pid for pid in below(1) if "VLLM::" in title(pid)} - before


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


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""
