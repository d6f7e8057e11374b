"""The configuration tree: a configuration that exists is a valid one."""

from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest

from llumnix.core.config import (
    ClusterConfig,
    Config,
    EngineConfig,
    FrontendConfig,
    Leaf,
    MigrationConfig,
    SchedulerConfig,
    SwapConfig,
)
from llumnix.core.errors import ConfigurationError

LEAVES: tuple[type[Leaf], ...] = (
    EngineConfig,
    SwapConfig,
    MigrationConfig,
    SchedulerConfig,
    FrontendConfig,
    ClusterConfig,
)
NUMBERS = [
    (leaf, spec.name)
    for leaf in LEAVES
    for spec in fields(leaf)  # type: ignore[arg-type]
    if type(spec.default) in (int, float)
]


def test_the_defaults_are_valid_and_every_setting_has_its_help() -> None:
    config = Config()
    for branch in fields(config):
        leaf = getattr(config, branch.name)
        assert is_dataclass(leaf) and type(leaf) in LEAVES
        for spec in fields(leaf):
            assert spec.metadata["help"], spec.name
            assert isinstance(spec.default, bool | int | float | str)


@pytest.mark.parametrize(("leaf", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_no_number_is_negative_or_no_number(leaf: type[Leaf], name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        leaf(**{name: -1})
    for number in (float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match=f"{name} must be finite"):
            leaf(**{name: number})


FLOATS = [(leaf, name) for leaf, name in NUMBERS if type(getattr(leaf, name)) is float]


@pytest.mark.parametrize(("leaf", "name"), FLOATS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_number_is_finite(leaf: type[Leaf], name: str, value: float) -> None:
    """A file may say nan or inf; instances would then refuse all settings that a manager tells them."""
    with pytest.raises(ConfigurationError, match=f"{name} must be finite"):
        leaf(**{name: value})


@pytest.mark.parametrize(
    ("leaf", "wrong"),
    [
        (EngineConfig, {"kind": "vlm"}),
        (EngineConfig, {"block_size": 17}),
        (EngineConfig, {"step_tokens_max": 0}),
        (EngineConfig, {"batch_max": 0}),
        (EngineConfig, {"waiting_max": 0}),
        (EngineConfig, {"gpu_memory_share": 1.5}),
        (EngineConfig, {"kv_gib": 0.0}),
        (MigrationConfig, {"transport": "rdma"}),
        (MigrationConfig, {"reservation_s": 1.0}),
        (SchedulerConfig, {"round_interval_s": 0.0}),
        (SchedulerConfig, {"high_freeness": 1.0}),
        (SchedulerConfig, {"silent_after_s": 0.0}),
        (FrontendConfig, {"port": 70000}),
        (FrontendConfig, {"requests_max": 0}),
        (ClusterConfig, {"instances": 0}),
        (ClusterConfig, {"instances": 2000}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.__name__,
)
def test_what_makes_no_sense_is_refused_by_name(leaf: type[Leaf], wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        leaf(**wrong)


def test_a_wrong_choice_names_the_right_ones() -> None:
    with pytest.raises(ConfigurationError, match="auto, inprocess, shm, zmq, got 'rdma'"):
        MigrationConfig(transport="rdma")


def test_settings_do_not_change() -> None:
    config = Config()
    with pytest.raises(FrozenInstanceError):
        config.scheduler.rest_s = 1.0  # type: ignore[misc]
