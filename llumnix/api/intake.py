"""A checked body becomes the sequences to generate: tokens, sampling settings, ids. Everything that can be
wrong with a request and is seen without running it is refused here, before anything of it reaches an
instance.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from secrets import randbits
from typing import TypeVar

from llumnix.api.backend import ModelInfo, StreamCall
from llumnix.api.errors import ApiError, refused
from llumnix.api.openai_schema import ChatBody, CompletionBody, Generation, Message, Prompt
from llumnix.api.tokenizer import PromptRefused, TextTokenizer
from llumnix.core.config import FrontendConfig
from llumnix.core.errors import ConfigurationError
from llumnix.core.sampling import GREEDY_ONLY, SEED_MAX, SamplingParams

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
THREAD_CHARS = 8192  # calls with more text are tokenized off the event loop
PROMPTS_MAX = 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence to generate and its place in the answer. ``echo`` is shown before what is generated."""

    index: int
    call: StreamCall
    echo: str = ""


class Intake:
    """Turns bodies into choices for one model."""

    def __init__(self, model: ModelInfo, tokenizer: TextTokenizer, config: FrontendConfig) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._vocab_size = max(model.vocab_size, tokenizer.vocab_size)

    def adapter(self, name: str | None) -> str:
        """The LoRA adapter that a body's model names, empty for the model itself, which is also meant by a
        body without a name. Raises 404 unless it is served here."""
        if name is None or name == self._model.name:
            return ""
        if name in self._model.adapters:
            return name
        raise ApiError(404, f"the model {name!r} does not exist here", param="model", code="model_not_found")

    async def completion(self, answer_id: str, body: CompletionBody) -> list[Choice]:
        """The choices of /v1/completions: n for each prompt, in order."""
        adapter = self.adapter(body.model)
        prompts = body.prompts
        if not prompts:
            raise refused("the prompt is empty", "prompt", "empty_prompt")
        if len(prompts) > PROMPTS_MAX:
            raise refused(f"at most {PROMPTS_MAX} prompts in one request", "prompt")
        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        tokenized = [await self._prompt_tokens(prompt, size) for prompt in prompts]
        choices: list[Choice] = []
        for prompt, tokens in zip(prompts, tokenized, strict=True):
            echo = ""
            if body.echo:
                echo = prompt if isinstance(prompt, str) else self._tokenizer.decode(tokens)
            room = self._room(tokens, body.max_tokens, "prompt", "max_tokens")
            max_tokens = body.max_tokens or min(COMPLETION_TOKENS, room)
            choices += self._choices(
                answer_id, body, adapter, tokens, max_tokens, len(choices), echo, len(prompts)
            )
        return choices

    async def chat(self, answer_id: str, body: ChatBody) -> list[Choice]:
        """The choices of /v1/chat/completions."""
        adapter = self.adapter(body.model)
        tokens = await self.chat_tokens(body.messages)
        wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        room = self._room(tokens, wanted, "messages", name)
        return self._choices(answer_id, body, adapter, tokens, wanted or room, 0, "", 1)

    async def chat_tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A conversation through the model's chat template."""
        plain = [message.plain for message in messages]
        size = sum(len(message["content"]) for message in plain)
        self._bound(size, "messages")
        try:
            return tuple(await _maybe_threaded(size, lambda: self._tokenizer.chat(plain)))
        except PromptRefused as error:
            raise refused(str(error), "messages") from error

    async def text_tokens(self, text: str) -> tuple[int, ...]:
        """A text as the model expects it."""
        return await self._encoded(text, len(text))

    async def _encoded(self, text: str, size: int) -> tuple[int, ...]:
        """The tokens of one of a call's texts, which have ``size`` characters together."""
        self._bound(len(text), "prompt")
        return tuple(await _maybe_threaded(size, lambda: self._tokenizer.encode(text)))

    async def _prompt_tokens(self, prompt: Prompt, size: int) -> tuple[int, ...]:
        tokens = await self._encoded(prompt, size) if isinstance(prompt, str) else tuple(prompt)
        if not prompt or not tokens:
            raise refused("the prompt is empty", "prompt", "empty_prompt")
        if min(tokens) < 0 or max(tokens) >= self._vocab_size:
            raise refused(f"prompt token ids must be within 0 and {self._vocab_size - 1}", "prompt")
        return tokens

    def _bound(self, chars: int, param: str) -> None:
        """Refuse before tokenizing what cannot fit: a token has at most so many bytes."""
        least = chars // self._tokenizer.longest_token_bytes
        if least >= self._model.max_model_len:
            raise self._too_long(f"at least {least}", 0, param)

    def _room(self, tokens: Sequence[int], wanted: int | None, param: str, wanted_param: str) -> int:
        """Tokens that may be generated after the prompt; 400 if there are none, or fewer than wanted."""
        room = self._model.max_model_len - len(tokens)
        if room < 1 or (wanted is not None and wanted > room):
            raise self._too_long(str(len(tokens)), wanted or 1, wanted_param if room >= 1 else param)
        return room

    def _too_long(self, prompt: str, wanted: int, param: str) -> ApiError:
        text = f"the model's context is {self._model.max_model_len} tokens, but the prompt has {prompt}"
        if wanted:
            text += f" and {wanted} are to be generated"
        return refused(text, param, "context_length_exceeded")

    def _choices(
        self,
        answer_id: str,
        body: Generation,
        adapter: str,
        tokens: tuple[int, ...],
        max_tokens: int,
        first_index: int,
        echo: str,
        prompts: int,
    ) -> list[Choice]:
        count = 1 if body.n is None else body.n
        if count > self._config.choices_max:
            raise refused(f"n must be at most {self._config.choices_max}, got {count}", "n")
        seed = randbits(63) if body.seed is None else body.seed
        alone = prompts * count == 1
        priority = body.priority or 0
        return [
            Choice(
                index=first_index + number,
                call=StreamCall(
                    request_id=answer_id if alone else f"{answer_id}-{first_index + number}",
                    prompt_tokens=tokens,
                    sampling=self._sampling(body, max_tokens, (seed + number) % (SEED_MAX + 1)),
                    scheduling_priority=priority,
                    execution_priority=priority,
                    tenant=body.user or "",
                    adapter=adapter,
                ),
                echo=echo,
            )
            for number in range(count)
        ]

    def _sampling(self, body: Generation, max_tokens: int, seed: int) -> SamplingParams:
        sampling = _sampling(body, max_tokens, seed)
        if self._model.greedy_only and not sampling.greedy:
            raise refused(GREEDY_ONLY, "temperature")
        return sampling


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _sampling(body: Generation, max_tokens: int, seed: int) -> SamplingParams:
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            min_tokens=_or(body.min_tokens, 0),
            temperature=float(_or(body.temperature, 1.0)),
            top_k=max(0, _or(body.top_k, 0)),
            top_p=float(_or(body.top_p, 1.0)),
            min_p=float(_or(body.min_p, 0.0)),
            repetition_penalty=float(_or(body.repetition_penalty, 1.0)),
            presence_penalty=float(_or(body.presence_penalty, 0.0)),
            frequency_penalty=float(_or(body.frequency_penalty, 0.0)),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            logprobs=body.logprobs_wanted,
        )
    except ConfigurationError as error:
        raise refused(str(error), str(error).split(" ", 1)[0]) from error


async def _maybe_threaded(chars: int, work: Callable[[], list[int]]) -> list[int]:
    return await asyncio.to_thread(work) if chars > THREAD_CHARS else work()
