"""Flags, files and defaults: precedence, and refusals that name what is wrong."""

from pathlib import Path

import pytest

from llumnix.core.config import Config, EngineConfig, FrontendConfig
from llumnix.core.config_source import build_config, read_file, settings, to_toml
from llumnix.core.errors import ConfigurationError


def written(folder: Path, text: str) -> Path:
    path = folder / "llumnix.toml"
    path.write_text(text)
    return path


def test_every_field_of_the_tree_is_a_setting_with_help_and_a_flag_of_its_own() -> None:
    found = settings()
    leaves = sum(
        len(type(getattr(Config(), name)).__dataclass_fields__) for name in Config.__dataclass_fields__
    )
    assert len(found) == leaves == len({setting.flag for setting in found})
    assert all(setting.help and type(setting.default) is setting.kind for setting in found)
    flags = {setting.flag for setting in found}
    assert {"engine", "model", "instances", "dispatch-policy", "block-size", "port"} <= flags


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, '[engine]\nkind = "simulated"\nblock_size = 32\n[cluster]\ninstances = 3\n')
    config = build_config({("engine", "block_size"): 64}, path)
    assert config.engine == EngineConfig(kind="simulated", block_size=64)
    assert config.cluster.instances == 3 and config.frontend == FrontendConfig()
    assert build_config({}) == Config()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[engin]\nkind = 'x'\n", r"unknown section \[engin\]; did you mean engine\?"),
        ("[engine]\nblok_size = 16\n", r"unknown setting engine.blok_size; did you mean block_size\?"),
        ("[cluster]\nzzz = 16\n", r"unknown setting cluster.zzz; there are instances, "),
        ("engine = 3\n", r"engine is a section"),
        ("[engine]\nblock_size = '16'\n", r"engine.block_size must be a whole number, got '16'"),
        ("[engine]\nblock_size = true\n", r"engine.block_size must be a whole number, got True"),
        ("[engine]\nmodel = 3\n", r"engine.model must be a text, got 3"),
        ("[engine\n", r"is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_reason(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigurationError, match=said) as caught:
        read_file(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        read_file(tmp_path / "nothing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="is not TOML"):
        read_file(tmp_path / "binary.toml")


def test_values_are_checked_as_anywhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="port must be at most 65535"):
        build_config({}, written(tmp_path, "[frontend]\nport = 70000\n"))


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    assert read_file(written(tmp_path, "[engine]\nkv_gib = 2\n")) == {("engine", "kv_gib"): 2.0}


def test_what_is_printed_can_be_read_back(tmp_path: Path) -> None:
    config = build_config({("engine", "model"): 'a "quoted"\\ path\nü', ("engine", "kv_gib"): 1e-3})
    assert build_config({}, written(tmp_path, to_toml(config))) == config


def test_secrets_are_not_printed() -> None:
    text = to_toml(build_config({("frontend", "admin_token"): "hush"}))
    assert "hush" not in text and "# admin_token is set" in text
