"""Text to tokens and back, for whichever model is served.

Reading tokens back must cost microseconds and be right across token boundaries. The decoders of today's
models only join the bytes of their tokens, so a table from id to bytes is made once and everything after is
byte joining and incremental UTF-8; what a tokenizer's own decoder would print for the whole sequence is what
the pieces add up to.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llumnix.api.chat_template import ChatTemplate, PromptRefused
from llumnix.core.errors import ConfigurationError

__all__ = ["ByteTable", "ChatMessage", "FolderTokenizer", "PromptRefused", "TextTokenizer", "load_tokenizer"]

ChatMessage = Mapping[str, Any]


class ByteTable:
    """The bytes of each token. ``strips_space``: the model's decoder drops one space at the very start."""

    def __init__(self, pieces: Sequence[bytes], special: frozenset[int], strips_space: bool) -> None:
        self.pieces = tuple(pieces)
        self.visible = tuple(b"" if token in special else piece for token, piece in enumerate(pieces))
        self.strips_space = strips_space

    def join(self, tokens: Sequence[int], skip_special: bool) -> bytes:
        """The tokens' bytes; ids the tokenizer does not have (a model's padding rows) are nothing."""
        pieces = self.visible if skip_special else self.pieces
        size = len(pieces)
        return b"".join([pieces[token] for token in tokens if token < size])

    def text(self, tokens: Sequence[int], skip_special: bool) -> str:
        """A whole sequence as text; what is no UTF-8 becomes the replacement character."""
        text = self.join(tokens, skip_special).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_space else text


class TextTokenizer(Protocol):
    """What the API needs of a tokenizer. ``longest_token_bytes`` bounds from below how many tokens a text
    has."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def longest_token_bytes(self) -> int: ...

    @property
    def table(self) -> ByteTable: ...

    def encode(self, text: str) -> list[int]:
        """A prompt as the model expects it, with its start token if it has one."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """A conversation up to where the assistant begins to speak. Raises PromptRefused."""
        ...


class FolderTokenizer:
    """A Hugging Face folder's fast tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigurationError(f"{folder} has no tokenizer.json")
        self._backend: Any = Tokenizer.from_file(str(path))
        self._template = ChatTemplate(folder)
        self.table = _byte_table(self._backend, folder)
        self.vocab_size = len(self.table.pieces)
        self.longest_token_bytes = max(map(len, self.table.pieces))

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=True).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.table.text(tokens, skip_special=False)

    def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        text = self._template.render(messages)
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def load_tokenizer(folder: str) -> TextTokenizer:
    """The tokenizer in a model's folder; the built-in byte tokenizer if there is no folder."""
    if folder:
        return FolderTokenizer(Path(folder))
    from llumnix.api.byte_tokenizer import ByteTokenizer

    return ByteTokenizer()


def _byte_table(backend: Any, folder: Path) -> ByteTable:
    """Read off the tokenizer's decoder how tokens become bytes. Raises ConfigurationError for an unknown
    kind."""
    described = json.loads(backend.to_str())
    decoder = described.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    special = frozenset(entry["id"] for entry in described["added_tokens"] if entry["special"])
    vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocab.values()) + 1)
    if "ByteLevel" in kinds:
        alphabet = _byte_level_alphabet()
        for text, token in vocab.items():
            known = [alphabet.get(char, -1) for char in text]
            pieces[token] = text.encode() if -1 in known else bytes(known)
        return ByteTable(pieces, special, False)
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and kinds:
        for text, token in vocab.items():
            is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
            pieces[token] = bytes([int(text[3:5], 16)]) if is_byte else text.replace("▁", " ").encode()
        return ByteTable(pieces, special, "Strip" in kinds or "Metaspace" in kinds)
    raise ConfigurationError(f"{folder}: tokenizers that decode with {kinds} are not supported")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE has used for bytes since GPT-2: printable Latin-1
    characters are themselves, every other byte is the next code point from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {
        chr(256 + i): value for i, value in enumerate(others)
    }
