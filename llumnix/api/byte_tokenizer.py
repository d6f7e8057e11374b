"""A tokenizer that needs no files: one token per byte of UTF-8. For clusters without a model (``--engine
simulated``), so that the whole API works from nothing, chat included."""

from collections.abc import Sequence

from llumnix.api.tokenizer import ByteTable, ChatMessage

BYTE_VOCAB_SIZE = 256


class ByteTokenizer:
    """Ids 0 … 255 are bytes; the end tokens of the simulated model, if any, lie above."""

    vocab_size = BYTE_VOCAB_SIZE
    longest_token_bytes = 1

    def __init__(self) -> None:
        self.table = ByteTable([bytes([value]) for value in range(BYTE_VOCAB_SIZE)], frozenset(), False)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return self.table.text(tokens, skip_special=False)

    def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines) + "assistant: ")
