"""Policies by name: built in, by module, by entry point; and what is said of broken ones."""

import importlib
from pathlib import Path

import pytest

from llumnix.core.config import SchedulerConfig
from llumnix.core.errors import ConfigurationError
from llumnix.core.views import ClusterSnapshot, Move
from llumnix.policies.affinity import AffinityDispatch
from llumnix.policies.dispatch import RoundRobin
from llumnix.policies.pairing import NoPairing
from llumnix.policies.registry import dispatch_policy, pairing_policy, selection_policy


class Mine:
    """A user's pairing policy."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config

    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        return ()


class WithoutConfig:
    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        return ()


def test_built_in_policies_by_name() -> None:
    assert isinstance(dispatch_policy(SchedulerConfig()), AffinityDispatch)
    assert isinstance(dispatch_policy(SchedulerConfig(dispatch_policy="round-robin")), RoundRobin)
    assert isinstance(pairing_policy(SchedulerConfig(pairing_policy="none")), NoPairing)
    assert selection_policy(SchedulerConfig()).select((), 1) == ()


def test_a_class_named_by_module_gets_the_configuration() -> None:
    config = SchedulerConfig(pairing_policy=f"{__name__}:Mine")
    policy = pairing_policy(config)
    assert isinstance(policy, Mine)
    assert policy.config is config


def test_an_entry_point_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real distribution on the path, as an installed plug-in is."""
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    points = "[llumnix.policies]\nmine = plugin_module:Pair\nbroken = plugin_module:Absent\n"
    (info / "entry_points.txt").write_text(points)
    (tmp_path / "plugin_module.py").write_text(
        "class Pair:\n    def __init__(self, config): pass\n    def pair(self, cluster): return ()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert type(pairing_policy(SchedulerConfig(pairing_policy="mine"))).__name__ == "Pair"
    with pytest.raises(ConfigurationError, match=r"'broken'.*Absent.*known: .*mine"):
        pairing_policy(SchedulerConfig(pairing_policy="broken"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("freenes", "unknown"),
        ("no_such_module:Policy", "No module named 'no_such_module'"),
        (f"{__name__}:Absent", "Absent"),
        ("json:JSONDecoder", "has no method pair"),
        (f"{__name__}:WithoutConfig", "cannot be constructed"),
        (f"{__name__}:NotReady", "cannot be constructed: raised OwnFault: no licence"),
        (":", "cannot be loaded"),
        ("", "unknown"),
    ],
)
def test_a_policy_that_does_not_work_is_refused_with_name_reason_and_choices(name: str, why: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        pairing_policy(SchedulerConfig(pairing_policy=name))
    text = str(caught.value)
    assert text.startswith(f"pairing policy {name!r}: ")
    assert why in text
    assert "drain, freeness, none" in text


class OwnFault(Exception):
    """No relation to any error of ours, nor to Python's usual ones."""


class NotReady:
    def __init__(self, config: SchedulerConfig) -> None:
        raise OwnFault("no licence")

    def pair(self, cluster: object) -> tuple[()]:
        return ()


@pytest.mark.parametrize(
    "fault",
    [
        "raise RuntimeError('no licence')",
        "x =",
        "undefined_name",
        "class Own(Exception): pass\nraise Own('no licence')",
        "raise SystemExit(2)",
    ],
)
def test_a_module_that_fails_to_import_is_named_with_its_fault(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"faulty_{abs(hash(fault))}"
    (tmp_path / f"{name}.py").write_text(fault + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigurationError, match=f"dispatch policy '{name}:P'.*cannot be loaded"):
        dispatch_policy(SchedulerConfig(dispatch_policy=f"{name}:P"))
