"""Answers as bytes, in OpenAI's shapes. What stays the same in every chunk of an answer is made once; per
chunk only the text is escaped. One renderer per answer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llumnix.api.choices import ChoiceDelta
from llumnix.api.tokenizer import ByteTable

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Usage:
    """Tokens of one answer; each prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int = 0

    def fields(self) -> dict[str, int]:
        """As OpenAI names them."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass(slots=True)
class Collected:
    """One choice, gathered for an answer that is not streamed."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


class Renderer(Protocol):
    """Renders one answer, streamed or whole."""

    def opening(self, index: int) -> bytes:
        """What a stream sends before a choice's first text; may be empty."""
        ...

    def chunk(self, index: int, delta: ChoiceDelta) -> bytes:
        """One delta of a stream; empty if it shows nothing."""
        ...

    def usage(self, usage: Usage) -> bytes: ...

    def logprobs(self, delta: ChoiceDelta) -> dict[str, Any] | None: ...

    def whole(self, choices: Sequence[Collected], usage: Usage) -> bytes: ...


class _Base:
    chunk_object: str
    whole_object: str

    def __init__(
        self,
        answer_id: str,
        created: int,
        model: str,
        table: ByteTable,
        *,
        wants_usage: bool,
        wants_logprobs: bool,
    ) -> None:
        self._table = table
        self._wants_logprobs = wants_logprobs
        self._head = {"id": answer_id, "object": self.whole_object, "created": created, "model": model}
        chunk_head = json.dumps(self._head | {"object": self.chunk_object}, separators=(",", ":"))
        self._open = f'data: {chunk_head[:-1]},"choices":['
        self._close = '],"usage":null}\n\n' if wants_usage else "]}\n\n"

    def usage(self, usage: Usage) -> bytes:
        """The chunk after the last choice that tells what the answer cost."""
        return f'{self._open}],"usage":{json.dumps(usage.fields(), separators=(",", ":"))}}}\n\n'.encode()

    def _whole(self, choices: list[dict[str, Any]], usage: Usage) -> bytes:
        return json.dumps(self._head | {"choices": choices, "usage": usage.fields()}).encode()

    def _token_text(self, token: int) -> str:
        return self._table.join((token,), False).decode("utf-8", "replace")


class CompletionRenderer(_Base):
    """/v1/completions."""

    chunk_object = whole_object = "text_completion"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> bytes:
        """Completions begin with text."""
        return b""

    def chunk(self, index: int, delta: ChoiceDelta) -> bytes:
        if not delta.text and not delta.finish_reason and not delta.logprobs:
            return b""
        finish = f'"{delta.finish_reason}"' if delta.finish_reason else "null"
        logprobs = "null"
        if self._wants_logprobs:
            logprobs = json.dumps(self._with_offsets(self.logprobs(delta), self._offsets.get(index, 0)))
            self._offsets[index] = self._offsets.get(index, 0) + len(delta.text)
        text = json.dumps(delta.text)
        return (
            f'{self._open}{{"index":{index},"text":{text},"logprobs":{logprobs},"finish_reason":{finish}}}'
            f"{self._close}"
        ).encode()

    def logprobs(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """OpenAI's older form: parallel lists."""
        if not self._wants_logprobs:
            return None
        return {
            "tokens": [self._token_text(token) for token in delta.tokens],
            "token_logprobs": [entry.logprob for entry in delta.logprobs],
            "top_logprobs": [
                {self._token_text(token): logprob for token, logprob in entry.top} for entry in delta.logprobs
            ],
        }

    def _with_offsets(self, logprobs: dict[str, Any] | None, offset: int) -> dict[str, Any] | None:
        if logprobs is not None:
            logprobs["text_offset"] = []
            for text in logprobs["tokens"]:
                logprobs["text_offset"].append(offset)
                offset += len(text)
        return logprobs

    def whole(self, choices: Sequence[Collected], usage: Usage) -> bytes:
        return self._whole([self._choice(index, choice) for index, choice in enumerate(choices)], usage)

    def _choice(self, index: int, choice: Collected) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if self._wants_logprobs:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
            for part in choice.logprobs:
                for name, values in logprobs.items():
                    values += part[name]
        return {
            "index": index,
            "text": "".join(choice.texts),
            "logprobs": self._with_offsets(logprobs, 0),
            "finish_reason": choice.finish_reason,
        }


class ChatRenderer(_Base):
    """/v1/chat/completions."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def opening(self, index: int) -> bytes:
        """The role comes first."""
        role = '{"role":"assistant","content":""}'
        return (
            f'{self._open}{{"index":{index},"delta":{role},"logprobs":null,"finish_reason":null}}{self._close}'
        ).encode()

    def chunk(self, index: int, delta: ChoiceDelta) -> bytes:
        if not delta.text and not delta.finish_reason and not delta.logprobs:
            return b""
        finish = f'"{delta.finish_reason}"' if delta.finish_reason else "null"
        logprobs = json.dumps(self.logprobs(delta)) if self._wants_logprobs else "null"
        content = f'{{"content":{json.dumps(delta.text)}}}' if delta.text else "{}"
        return (
            f'{self._open}{{"index":{index},"delta":{content},"logprobs":{logprobs},"finish_reason":{finish}}}'
            f"{self._close}"
        ).encode()

    def logprobs(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """One entry per token, with its bytes: a token may be part of a character."""
        if not self._wants_logprobs:
            return None
        pairs = zip(delta.tokens, delta.logprobs, strict=False)
        return {
            "content": [
                self._entry(token, entry.logprob)
                | {"top_logprobs": [self._entry(other, logprob) for other, logprob in entry.top]}
                for token, entry in pairs
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._table.join((token,), False)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    def whole(self, choices: Sequence[Collected], usage: Usage) -> bytes:
        return self._whole([self._choice(index, choice) for index, choice in enumerate(choices)], usage)

    def _choice(self, index: int, choice: Collected) -> dict[str, Any]:
        content = [entry for part in choice.logprobs for entry in part["content"]]
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": {"content": content, "refusal": None} if self._wants_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
