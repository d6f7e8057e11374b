"""The command line: settings in, plain errors out, and a fast start. What it says of a running server is
tested in tests/e2e/test_cli_server.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llumnix import __version__
from llumnix.cli import main as cli
from llumnix.core.config_source import read_file, settings

HEAVY = ("torch", "ray", "transformers", "fastapi", "uvicorn", "zmq", "pydantic", "numpy")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "version") == (0, f"{__version__}\n", "")


def test_config_prints_what_serve_would_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[engine]\nkind = "simulated"\nblock_size = 32\n')
    status, out, _ = run(capsys, "config", "--config", str(path), "--block-size", "64", "--instances", "3")
    assert status == 0
    (tmp_path / "out.toml").write_text(out)
    values = read_file(tmp_path / "out.toml")
    assert values["engine", "kind"] == "simulated" and values["engine", "block_size"] == 64
    assert values["cluster", "instances"] == 3


def test_the_token_is_taken_from_the_environment_and_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLUMNIX_ADMIN_TOKEN", "sesame")
    status, out, _ = run(capsys, "config")
    assert status == 0 and "admin_token is set" in out and "sesame" not in out


def test_every_setting_is_an_option_of_serve(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "serve", "--help")
    assert status == 0
    assert [setting.flag for setting in settings() if f"--{setting.flag}" not in out] == []


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["serve", "--port", "70000"], 1, "port must be at most 65535"),
        (["serve", "--instances", "0"], 1, "instances must be within"),
        (["serve", "--block-size", "x"], 2, "'x' is not a valid integer"),
        (["serve", "--engine", "magic"], 2, "'magic' is not one of"),
        (["serve", "--modl", "x"], 2, "--model"),
        (["serve", "--config", "/nowhere.toml"], 2, "does not exist"),
        (["stats"], 2, "No such command 'stats'"),
        (["bench", "nothing"], 2, "No such command 'nothing'"),
        (["bench", "swap", "--pool-blocks", "128"], 2, "x>=1024"),  # whose next request may never fit
        (["bench", "swap", "--device", "gpu"], 2, "is not one of"),
        (["bench", "fairness", "--jobs", "0"], 2, "x>=1"),
        (["bench", "engine", "--steps", "0"], 2, "x>=1"),
        (["bench", "simulator", "--seed", "-1"], 2, "x>=0"),
        (["migrate", "r"], 2, "--to"),
        (["scale", "0"], 2, "x>=1"),
        (["status", "--url", "nonsense"], 1, "cannot call nonsense"),
        (["status", "--url", "http://a:b"], 1, "cannot call http://a:b"),
    ],
)
def test_errors_are_one_plain_line_and_a_status(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, said: str
) -> None:
    got, out, err = run(capsys, *arguments)
    assert (got, out) == (status, "")
    assert said in err and err.startswith("llumnix") and err.count("\n") == 1


def test_without_a_command_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys)
    assert status == 2 and "migrate" in err and "Usage: llumnix" in err


def test_benchmarks_are_listed_without_being_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "bench", "--help")
    assert status == 0 and all(name in out for name in cli.BENCHMARKS)


def test_admin_commands_import_nothing_heavy() -> None:
    """In a process of its own, up to the failing call."""
    code = (
        "import sys, json; from llumnix.cli.main import main; "
        "status = main(['status', '--url', 'nonsense']); "
        f"print(json.dumps([status, [name for name in {HEAVY!r} if name in sys.modules]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == [1, []]
