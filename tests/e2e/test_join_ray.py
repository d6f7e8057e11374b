"""Joining a Ray cluster that is not there."""

import os
import socket
import time
from typing import Any

import pytest

from llumnix.cli.main import main
from llumnix.core.config import ClusterConfig, Config
from llumnix.core.errors import ConfigurationError
from llumnix.runtime import launch

pytestmark = pytest.mark.e2e


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_serve_says_at_once_that_nothing_answers(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    begun = time.monotonic()
    status = main(["serve", "--engine", "simulated", "--port", "0", "--ray-address", f"127.0.0.1:{port}"])
    said = capsys.readouterr().err
    assert status != 0 and time.monotonic() - begun < 15
    assert f"no Ray cluster answers at 127.0.0.1:{port}: " in said and "refused" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "address", ["127.0.0.1:9", "[::1]:9", "no-such-host.invalid:6379", "127.0.0.1:99999"]
)
def test_nothing_answers(address: str) -> None:
    with pytest.raises(ConfigurationError, match="no Ray cluster answers at"):
        launch.check_reachable(address)


@pytest.mark.parametrize("address", ["", "auto", "local", "127.0.0.1", "ray://127.0.0.1:9"])
def test_other_forms_are_left_to_ray(address: str) -> None:
    launch.check_reachable(address)


def test_the_address_that_the_environment_names_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigurationError, match=address):
        launch.start_ray(Config(cluster=ClusterConfig(ray_address="auto")))


def test_ray_tries_once_to_join_and_its_settings_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, str | None]] = []
    monkeypatch.delenv(launch.JOIN_ATTEMPTS, raising=False)
    monkeypatch.setattr(
        launch.ray, "init", lambda **how: seen.append((how["address"], os.environ.get(launch.JOIN_ATTEMPTS)))
    )
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        assert launch.start_ray(Config(cluster=ClusterConfig(ray_address=address)))
    assert seen == [(address, "1")] and launch.JOIN_ATTEMPTS not in os.environ
    assert launch.start_ray(Config(cluster=ClusterConfig(ray_address="")))
    assert seen[1] == ("local", None)
