"""`llumnix serve --engine vllm` as users run it: Ray, HTTP, the command line and the openai client."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

COMMAND = [sys.executable, "-m", "llumnix.cli.main"]
SERVE = [
    *("serve", "--engine", "vllm", "--model", "smollm2", "--dtype", "float32", "--port", "0"),
    *("--kv-blocks", "400", "--max-model-len", "1024", "--staging-gib", "0.1", "--pairing-policy", "none"),
]
STORY = "Tell a long story about a river, a mill and a miller who lost his hat."


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    arguments = [
        *SERVE,
        "--instances",
        "2",
        "--engine-arg",
        "enforce_eager=true",
        "--engine-arg",
        "block_size=32",
    ]
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ, start_new_session=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        assert line.startswith("smollm2 on 2 instances: "), line
        yield line.split(": ", 1)[1].split("/v1")[0]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def cli(url: str, *arguments: str) -> str:
    done = subprocess.run([*COMMAND, *arguments, "--url", url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tell(url: str, pieces: list[str]) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": STORY}],
        max_tokens=300,
        temperature=0.7,
        seed=11,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)


def test_a_chat_goes_on_unchanged_while_it_moves_from_vllm_to_vllm(url: str) -> None:
    undisturbed: list[str] = []
    tell(url, undisturbed)
    moved: list[str] = []
    client = threading.Thread(target=tell, args=(url, moved))
    client.start()
    moves = 0
    while client.is_alive() and moves < 2:
        rows = json.loads(cli(url, "requests", "--json"))
        for row in rows:
            target = "i1" if row["instance_id"] == "i0" else "i0"
            order = {"request_id": row["request_id"], "target_id": target}
            moves += "committed" in httpx.post(f"{url}/admin/migrate", json=order, timeout=60).text
        time.sleep(0.05)
    client.join()
    assert moves >= 1
    assert "".join(moved) == "".join(undisturbed)
    assert all(row["state"] == "serving" for row in json.loads(cli(url, "instances", "--json")))


def test_a_vllm_that_does_not_start_leaves_a_line_and_nothing_running() -> None:
    arguments = [*SERVE, "--instances", "1", "--engine-arg", "quantization=no_such_thing"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "no_such_thing" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
