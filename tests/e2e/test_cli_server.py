"""Admin commands against a server on a socket: tables, JSON, refusals."""

import json
from collections.abc import Iterator

import pytest
from local_backend import Served, served

from llumnix.cli import admin
from llumnix.cli.main import main
from llumnix.core.config import EngineConfig, FrontendConfig

TOKEN = "sesame"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    engine = EngineConfig(kind="simulated", simulated_step_ms=1, max_model_len=512, kv_blocks=64)
    with served(engine, FrontendConfig(port=0, admin_token=TOKEN)) as running:
        yield running


@pytest.fixture(autouse=True)
def environment(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLUMNIX_URL", server.url)
    monkeypatch.setenv("LLUMNIX_ADMIN_TOKEN", TOKEN)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "status")
    assert status == 0 and "manager incarnation    m-1" in out
    status, out, _ = run(capsys, "instances")
    assert status == 0 and "instance-0" in out and "serving" in out and "0/64" in out
    assert run(capsys, "requests") == (0, "no requests\n", "")
    status, out, _ = run(capsys, "events")
    assert status == 0 and len(out.splitlines()) == 3 and "event 2" in out


def test_all_events_are_shown_though_they_come_in_pages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "EVENTS_PAGE", 2)
    assert len(run(capsys, "events")[1].splitlines()) == 3
    assert [one["sequence"] for one in json.loads(run(capsys, "events", "--json")[1])] == [1, 2, 3]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(run(capsys, "status", "--json")[1])["frontends"] == 1
    assert json.loads(run(capsys, "instances", "--json")[1])[0]["capacity_blocks"] == 64
    assert json.loads(run(capsys, "requests", "--json")[1]) == []
    assert [one["sequence"] for one in json.loads(run(capsys, "events", "--json", "--after", "1")[1])] == [
        2,
        3,
    ]
    moved = json.loads(run(capsys, "migrate", "r", "--to", "instance-1", "--json")[1])
    assert moved["outcome"] == "committed"
    assert json.loads(run(capsys, "scale", "2", "--json")[1])["serving"] == 1


def test_orders(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "migrate", "r-7", "--to", "instance-1")
    assert status == 0 and "committed" in out and "2.0 ms" in out
    assert run(capsys, "drain", "instance-0") == (0, "instance-0 is serving\n", "")
    assert run(capsys, "resume", "instance-0")[0] == 0
    assert run(capsys, "role", "instance-0", "decode") == (0, "instance-0 is decode\n", "")
    assert run(capsys, "scale", "3")[0] == 0
    assert server.backend.admin.orders[-5:] == [
        ("migrate", "r-7", "instance-1"), ("drain", "instance-0"), ("resume", "instance-0"),
        ("role", "instance-0", "decode"), ("scale", "3"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["migrate", "r", "--to", "nowhere"], "llumnix: there is no instance nowhere\n"),
        (["drain", "nowhere"], "llumnix: there is no instance nowhere\n"),
        (["role", "nowhere", "prefill"], "llumnix: there is no instance nowhere\n"),
        (["scale", "9"], "llumnix: at most 4 instances\n"),
        (
            ["status", "--token", "wrong"],
            "needs the admin token; give it with --token or LLUMNIX_ADMIN_TOKEN\n",
        ),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "") and err.endswith(said) and err.count("\n") == 1


def test_a_server_of_another_kind(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "status", "--url", f"{server.url}/v1/models")
    assert status == 1 and "the model 'admin/status' does not exist here" in err


def test_a_manager_that_is_away(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    server.backend.admin.away = True
    try:
        status, _, err = run(capsys, "instances")
    finally:
        server.backend.admin.away = False
    assert status == 1 and err == "llumnix: the manager is being restarted; serving goes on\n"
