"""The tokenizer of a real folder against transformers' own reading of it."""

from pathlib import Path
from typing import Any

import pytest

from llumnix.api.chat_template import ChatTemplate, PromptRefused
from llumnix.api.detokenizer import TextStream
from llumnix.api.tokenizer import FolderTokenizer
from llumnix.core.errors import ConfigurationError
from llumnix.instance.model_loader import resolve_model

TEXTS = [
    "Hello",
    "  two spaces\n\n\ttab",
    "héllo 世界 😀",
    "def f(x):\n    return x**2",
    "",
    "<|im_end|> said",
]
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "héllo 世界 😀"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(resolve_model("smollm2"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> FolderTokenizer:
    return FolderTokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


@pytest.mark.parametrize("text", TEXTS)
def test_texts(ours: FolderTokenizer, theirs: Any, text: str) -> None:
    tokens = ours.encode(text)
    assert tokens == theirs(text)["input_ids"]
    assert ours.decode(tokens) == theirs.decode(tokens) == text
    stream = TextStream(ours.table, ["never said"])
    pieces = [stream.push([token]).text for token in tokens] + [stream.push([], last=True).text]
    assert "".join(pieces) == theirs.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("messages", CHATS)
def test_chats(ours: FolderTokenizer, theirs: Any, messages: list[dict[str, str]]) -> None:
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.decode(ours.chat(messages)) == text
    assert ours.chat(messages) == theirs(text, add_special_tokens=False)["input_ids"]


def test_templates_that_refuse_are_broken_or_missing(tmp_path: Path) -> None:
    with pytest.raises(PromptRefused, match="no chat template"):
        ChatTemplate(tmp_path).render(CHATS[0])
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        '{"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}{{ messages[0].content }}"}'
    )
    assert ChatTemplate(tmp_path).render(CHATS[0]) == "<s>hi"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptRefused, match="roles must alternate"):
        ChatTemplate(tmp_path).render(CHATS[0])
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ConfigurationError, match="broken"):
        ChatTemplate(tmp_path)
    config.write_text("{")
    with pytest.raises(ConfigurationError, match="not JSON"):
        ChatTemplate(tmp_path)
    with pytest.raises(ConfigurationError, match=r"no tokenizer\.json"):
        FolderTokenizer(tmp_path)
