"""Bodies of the OpenAI routes: what is taken, what is refused, and which parameter is named."""

import asyncio
import json
import threading
from typing import Any

import pytest
from pydantic import ValidationError

from llumnix.api.backend import ModelInfo
from llumnix.api.byte_tokenizer import ByteTokenizer
from llumnix.api.errors import ApiError, validation_error
from llumnix.api.intake import Intake
from llumnix.api.openai_schema import ChatBody, CompletionBody, Generation
from llumnix.api.tokenizer import TextTokenizer
from llumnix.core.config import FrontendConfig
from llumnix.core.sampling import LOGPROBS_OFF, SEED_MAX

CHAT = [{"role": "user", "content": "hi"}]
TOKENIZER: TextTokenizer = ByteTokenizer()
INTAKE = Intake(ModelInfo("m", 100, "", (256,), 257), TOKENIZER, FrontendConfig(choices_max=4))


def read(kind: type[Generation], body: dict[str, Any]) -> Any:
    try:
        return kind.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise validation_error(error) from error


def completion(**body: Any) -> Any:
    return read(CompletionBody, {"prompt": "hi"} | body)


def chat(**body: Any) -> Any:
    return read(ChatBody, {"messages": CHAT} | body)


def choices(body: Any) -> Any:
    make = INTAKE.chat if isinstance(body, ChatBody) else INTAKE.completion
    return asyncio.run(make("id", body))


def refused(body: Any) -> ApiError:
    """The refusal of a body, by schema or intake."""
    with pytest.raises(ApiError) as caught:
        choices(body())
    return caught.value


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("n", "2"), ("n", 0), ("n", -1), ("n", 2.5), ("n", True), ("n", 5), ("n", 10**20),
            ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", 1e999),
            ("top_p", 0), ("top_p", 1.5), ("top_k", -2), ("min_p", 2), ("repetition_penalty", 0),
            ("presence_penalty", 3), ("frequency_penalty", -2.5), ("seed", -1), ("seed", SEED_MAX + 1),
            ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 10**30), ("min_tokens", -1),
            ("stop", ""), ("stop", ["a"] * 17), ("stop", ["x" * 300]), ("stop_token_ids", [1] * 100),
            ("stop_token_ids", [-1]), ("priority", 101), ("priority", -101), ("user", "x" * 300), ("user", 3),
            ("stream", "yes"), ("echo", 1), ("logprobs", 21), ("logprobs", -1),
            ("best_of", 2), ("suffix", "x"), ("logit_bias", {"5": 1}), ("guided_json", {}),
        ],
    )  # fmt: skip
    def test_a_wrong_value_is_400_and_names_the_parameter(self, name: str, value: Any) -> None:
        error = refused(lambda: completion(**{name: value}))
        assert (error.status, error.kind) == (400, "invalid_request_error")
        assert error.param is not None and error.param.split("[")[0] == name
        assert name in error.message

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"tools": [{"type": "function"}]}, "tools"),
            ({"messages": []}, "messages"),
            ({"messages": "hi"}, "messages"),
            ({"messages": [{"content": "hi"}]}, "messages[0].role"),
            ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                "messages[0].content[0].type",
            ),
            ({"top_logprobs": 3}, "top_logprobs"),
            ({"stream_options": {"include_usage": True}}, "stream_options"),
            ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ],
    )
    def test_a_wrong_chat_is_400_and_names_the_parameter(self, body: dict[str, Any], param: str) -> None:
        error = refused(lambda: chat(**body))
        assert (error.status, error.param) == (400, param)

    @pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", ""], [[1], []]])
    def test_an_empty_prompt_is_400(self, prompt: Any) -> None:
        assert refused(lambda: completion(prompt=prompt)).code == "empty_prompt"

    @pytest.mark.parametrize(
        "prompt", [[-1], [257], [[3, 257]], [10**20], 3, {"a": 1}, [1, "a"], [True], None]
    )
    def test_a_prompt_of_no_known_form_is_400(self, prompt: Any) -> None:
        error = refused(lambda: completion(prompt=prompt))
        assert error.status == 400 and (error.param or "").startswith("prompt")

    @pytest.mark.parametrize(
        ("body", "numbers"),
        [
            ({"prompt": "x" * 100}, ["100"]),
            ({"prompt": [1] * 100}, ["100"]),
            ({"prompt": "x" * 5000}, ["100", "5000"]),
            ({"prompt": "x" * 60, "max_tokens": 41}, ["100", "60", "41"]),
        ],
    )
    def test_more_than_the_context_is_400_with_the_numbers(
        self, body: dict[str, Any], numbers: list[str]
    ) -> None:
        error = refused(lambda: completion(**body))
        assert (error.status, error.code) == (400, "context_length_exceeded")
        assert all(number in error.message for number in numbers)

    def test_another_model_is_404(self) -> None:
        assert refused(lambda: completion(model="other")).status == 404
        assert refused(lambda: chat(model="other")).code == "model_not_found"

    def test_a_body_that_is_no_object_is_400(self) -> None:
        for text in ("[]", "3", "{", "", "null"):
            with pytest.raises(ValidationError) as caught:
                CompletionBody.model_validate_json(text)
            assert validation_error(caught.value).status == 400


class TestTaken:
    def test_unknown_fields_and_defaults_of_unsupported_ones_are_ignored(self) -> None:
        assert len(choices(completion(best_of=1, suffix=None, logit_bias={}, brand_new=3))) == 1
        assert len(choices(chat(response_format={"type": "text"}, tools=[], metadata={}))) == 1

    def test_sampling_settings_reach_the_call(self) -> None:
        body = completion(
            temperature=0, top_p=0.5, top_k=7, min_p=0.1, repetition_penalty=1.5, presence_penalty=1,
            frequency_penalty=-1, seed=9, max_tokens=20, min_tokens=3, ignore_eos=True, stop_token_ids=[5, 6],
            logprobs=2, priority=-7, user="acme", n=2,
        )  # fmt: skip
        first, second = choices(body)
        sampling = first.call.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 0.5, 7, 0.1)
        assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (
            1.5,
            1,
            -1,
        )
        assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (20, 3, True)
        assert (sampling.stop_token_ids, sampling.logprobs, sampling.seed) == ((5, 6), 2, 9)
        assert (first.call.scheduling_priority, first.call.execution_priority) == (-7, -7)
        assert first.call.tenant == "acme" and second.call.sampling.seed == 10
        assert [first.call.request_id, second.call.request_id] == ["id-0", "id-1"]

    def test_prompts_in_every_form(self) -> None:
        assert [one.call.prompt_tokens for one in choices(completion(prompt="ab"))] == [(97, 98)]
        assert [one.call.prompt_tokens for one in choices(completion(prompt=["a", "b"]))] == [(97,), (98,)]
        assert [one.call.prompt_tokens for one in choices(completion(prompt=[1, 2]))] == [(1, 2)]
        made = choices(completion(prompt=[[1], [2]], n=2, echo=True))
        assert [one.call.prompt_tokens for one in made] == [(1,), (1,), (2,), (2,)]
        assert [one.index for one in made] == [0, 1, 2, 3] and made[0].echo == "\x01"

    def test_how_much_is_generated_by_default(self) -> None:
        assert choices(completion())[0].call.sampling.max_tokens == 16
        assert choices(completion(prompt="x" * 95))[0].call.sampling.max_tokens == 5
        (made,) = choices(chat())
        assert made.call.sampling.max_tokens == 100 - len(made.call.prompt_tokens)
        assert choices(chat(max_tokens=3))[0].call.sampling.max_tokens == 3
        assert choices(chat(max_tokens=3, max_completion_tokens=4))[0].call.sampling.max_tokens == 4

    def test_messages_become_text(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        (made,) = choices(
            chat(messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}])
        )
        assert bytes(made.call.prompt_tokens).decode() == "system: x\nuser: ab\nassistant: "

    def test_seeds_differ_where_none_is_given(self) -> None:
        seeds = {choices(completion())[0].call.sampling.seed for _ in range(5)}
        assert len(seeds) == 5

    def test_log_probabilities_as_each_route_words_them(self) -> None:
        assert completion().logprobs_wanted == chat().logprobs_wanted == chat(logprobs=False).logprobs_wanted
        assert chat().logprobs_wanted == LOGPROBS_OFF
        assert completion(logprobs=0).logprobs_wanted == chat(logprobs=True).logprobs_wanted == 0
        assert chat(logprobs=True, top_logprobs=4).logprobs_wanted == 4


class Watched(ByteTokenizer):
    """Notes which threads tokenize."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[str] = set()

    def encode(self, text: str) -> list[int]:
        self.threads.add(threading.current_thread().name)
        return super().encode(text)


@pytest.mark.parametrize(("prompts", "on_loop"), [(2, True), (400, False)])
def test_much_text_is_tokenized_off_the_event_loop_though_each_part_is_short(
    prompts: int, on_loop: bool
) -> None:
    tokenizer = Watched()
    intake = Intake(ModelInfo("m", 100, "", (256,), 257), tokenizer, FrontendConfig())
    body = completion(prompt=["a text of some thirty characters"] * prompts)
    assert len(asyncio.run(intake.completion("id", body))) == prompts
    assert (threading.main_thread().name in tokenizer.threads) == on_loop
