"""The bodies of the OpenAI routes: what is read, its bounds, and what is refused by name.

Types are strict, as at OpenAI: ``"n": "2"`` is an error. Unknown fields are ignored, since clients send many
that change nothing here; fields known to change the answer that we do not have are refused unless they are at
their default.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llumnix.api.detokenizer import STOP_CHARS_MAX, STOPS_MAX
from llumnix.api.errors import refused
from llumnix.core.sampling import LOGPROBS_MAX, LOGPROBS_OFF, SEED_MAX, STOP_TOKENS_MAX

PRIORITY_MAX = 100
USER_CHARS_MAX = 256
TOKENS_MAX = 2**31 - 1

Prompt = str | list[int]
Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARS_MAX)]
TokenId = Annotated[int, Field(ge=0, le=TOKENS_MAX)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Body):
    """``include_usage``: a last chunk with token counts. ``continuous_usage_stats`` is not offered."""

    include_usage: bool = False


class Generation(_Body):
    """What completions and chat share. ``priority``: higher is more urgent, −100 … 100, for both the queue's
    order and the room kept beside the running request. ``user`` names the tenant. The fields from ``top_k``
    on are vLLM's."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "logit_bias": (None, {}),
        "use_beam_search": (None, False),
        "prompt_logprobs": (None, 0),
        "guided_json": (None,),
        "guided_regex": (None,),
        "guided_choice": (None,),
        "guided_grammar": (None,),
        "structured_outputs": (None,),
        "truncate_prompt_tokens": (None,),
        "bad_words": (None, []),
        "logits_processors": (None, []),
    }

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, le=SEED_MAX)] | None = None
    stop: str | Annotated[list[Stop], Field(max_length=STOPS_MAX)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)] | None = None
    user: Annotated[str, Field(max_length=USER_CHARS_MAX)] | None = None
    priority: Annotated[int, Field(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=TOKENS_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=TOKENS_MAX)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=STOP_TOKENS_MAX)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for name, defaults in cls.unsupported.items():
                if name in body and body[name] not in defaults:
                    raise refused(f"{name} is not supported", name, "unsupported_parameter")
        return body

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options is only allowed with stream: true", "stream_options")
        return self

    @field_validator("stop")
    @classmethod
    def _stop_is_bounded(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, str) and not 1 <= len(stop) <= STOP_CHARS_MAX:
            raise ValueError(f"a stop string has 1 to {STOP_CHARS_MAX} characters")
        return stop

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def logprobs_wanted(self) -> int:
        """As SamplingParams.logprobs; each route words the wish its own way."""
        return LOGPROBS_OFF

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Generation):
    """POST /v1/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Generation.unsupported,
        "suffix": (None, ""),
        "best_of": (None, 1),
    }

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None

    @model_validator(mode="after")
    def _no_prompt_logprobs(self) -> "CompletionBody":
        if self.echo and self.logprobs is not None:
            raise refused("echo together with logprobs is not supported", "echo", "unsupported_parameter")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts_or_ids: list[Any] = self.prompt
        if texts_or_ids and isinstance(texts_or_ids[0], int):
            return [texts_or_ids]
        return texts_or_ids

    @property
    def logprobs_wanted(self) -> int:
        """As SamplingParams.logprobs."""
        return LOGPROBS_OFF if self.logprobs is None else self.logprobs


class TextPart(_Body):
    """A content part; only text is understood."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One message of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it. ``developer`` is OpenAI's newer word for ``system``."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Generation.unsupported,
        "response_format": (None, {"type": "text"}),
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "modalities": (None, [], ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "web_search_options": (None,),
        "chat_template": (None,),
        "chat_template_kwargs": (None, {}),
        "echo": (None, False),
        "add_generation_prompt": (None, True),
        "continue_final_message": (None, False),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs needs logprobs: true", "top_logprobs")
        return self

    @property
    def logprobs_wanted(self) -> int:
        """As SamplingParams.logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else LOGPROBS_OFF


class TokenizeBody(_Body):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
