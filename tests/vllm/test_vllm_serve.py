"""`llumnix serve --engine vllm` as users run it: Ray, HTTP, the command line and the openai client."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from lora_adapters import write_adapter
from openai import NotFoundError, OpenAI

from llumnix.bench import vllm_serving
from llumnix.bench.live import DISPATCH_ONLY
from llumnix.bench.live_load import RealCluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

COMMAND = [sys.executable, "-m", "llumnix.cli.main"]
SERVE = [
    *("serve", "--engine", "vllm", "--model", "smollm2", "--dtype", "float32", "--port", "0"),
    *("--kv-blocks", "400", "--max-model-len", "1024", "--staging-gib", "0.1", "--pairing-policy", "none"),
]
STORY = "Tell a long story about a river, a mill and a miller who lost his hat."


BATCH_MAX = 2
CHAT_TOKENS = 160
WAIT_S = 60.0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("adapters")
    arguments = [
        *SERVE,
        *("--instances", "2", "--batch-max", str(BATCH_MAX)),
        *("--engine-arg", "enforce_eager=true", "--engine-arg", "block_size=32"),
        *("--lora-modules", f"sql={write_adapter(folder / 'sql', 1)}"),
        *("--lora-modules", f"law={write_adapter(folder / 'law', 2)}", "--engine-arg", "max_loras=2"),
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
        max_tokens=CHAT_TOKENS,
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
    (row,) = rows(url, lambda found: bool(found))
    assert row["request_id"] in cli(url, "requests", "--json")
    moves = 0
    while client.is_alive() and moves < 2:
        for row in rows(url, lambda found: True):
            target = "i1" if row["instance_id"] == "i0" else "i0"
            moves += "committed" in order(url, "migrate", request_id=row["request_id"], target_id=target)
        time.sleep(0.05)
    client.join()
    assert moves >= 1
    assert "".join(moved) == "".join(undisturbed)
    assert all(row["state"] == "serving" for row in json.loads(cli(url, "instances", "--json")))


@pytest.fixture(scope="module")
def refused(url: str) -> Iterator[subprocess.Popen[str]]:
    """A second cluster, whose vLLM does not start: it takes its time for that while others are tested."""
    arguments = [*SERVE, "--instances", "1", "--engine-arg", "quantization=no_such_thing"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*COMMAND, *arguments], text=True, **pipes) as process:
        yield process
        process.kill()


@pytest.mark.usefixtures("refused")
def test_vllms_own_client_is_served_and_its_report_understood(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = vllm_serving.client_options
    monkeypatch.setattr(
        vllm_serving, "client_options", lambda *load: ["20" if one == "200" else one for one in whole(*load)]
    )
    load, cluster = (3, 10.0, 1), RealCluster(url)
    done = vllm_serving._run_once(cluster, vllm_serving.settings(), DISPATCH_ONLY, load)
    row = vllm_serving._row(DISPATCH_ONLY, [done, done])
    assert (row["completed"], row["failed"], row["migrations"]) == (6, 0, 0)
    assert set(row) == {"mode", *vllm_serving.FIGURES, "preemptions", "migrations"}
    assert 0 < row["median_ttft_ms"] <= row["p99_ttft_ms"] and row["output_throughput"] > 0


def complete(url: str, model: str) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    extra = {"ignore_eos": True}
    done = client.completions.create(
        model=model, prompt=STORY, max_tokens=120, temperature=0.0, extra_body=extra
    )
    return done.choices[0].text


def rows(url: str, told: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """The requests of the cluster, once they are as ``told``."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        found: list[dict[str, Any]] = httpx.get(f"{url}/admin/requests", timeout=WAIT_S).json()["data"]
        if told(found):
            return found
        time.sleep(0.02)
    raise AssertionError(found)


def order(url: str, what: str, **arguments: str) -> str:
    return httpx.post(f"{url}/admin/{what}", json=arguments, timeout=WAIT_S).text


def test_adapters_are_models_that_move_waiting_and_running_and_outlive_an_instance(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    assert {model.id for model in client.models.list()} == {"smollm2", "sql", "law"}
    with pytest.raises(NotFoundError, match="no_such_adapter"):
        complete(url, "no_such_adapter")
    with ThreadPoolExecutor() as clients:
        models = ("sql", "law", "smollm2")
        undisturbed = dict(zip(models, clients.map(lambda model: complete(url, model), models), strict=True))
        assert len(set(undisturbed.values())) == 3, "the adapters change nothing"
        order(url, "drain", instance_id="i1")
        asked = (*models[:BATCH_MAX], "sql", "law")
        answers = [clients.submit(complete, url, model) for model in asked]
        found = rows(
            url, lambda seen: [one["status"] for one in seen].count("waiting") == len(asked) - BATCH_MAX
        )
        order(url, "resume", instance_id="i1")
        assert {one["instance_id"] for one in found} == {"i0"}
        for status in ("waiting", "running"):
            name = next(one["request_id"] for one in found if one["status"] == status)
            assert "committed" in order(url, "migrate", request_id=name, target_id="i1")
        rows(url, lambda seen: any(one["instance_id"] == "i0" and one["output_tokens"] for one in seen))
        (victim,) = (one for one in json.loads(cli(url, "instances", "--json")) if one["instance_id"] == "i0")
        os.kill(victim["pid"], signal.SIGKILL)
        assert [answer.result() for answer in answers] == [undisturbed[model] for model in asked]


def test_a_vllm_that_does_not_start_leaves_a_line_and_nothing_running(refused: subprocess.Popen[str]) -> None:
    said, complaint = refused.communicate(timeout=200)
    assert (refused.returncode, said) == (1, "")
    assert "no_such_thing" in complaint
    assert len(complaint.strip().splitlines()) == 1, complaint
