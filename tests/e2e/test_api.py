"""The API on a real socket over a real engine core and stream table: what OpenAI clients and badly behaved
ones get."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from local_backend import Served, served

from llumnix.core.config import EngineConfig, FrontendConfig
from llumnix.instance.simulated_executor import simulated_token

ENGINE = EngineConfig(kind="simulated", simulated_step_ms=1, max_model_len=512, kv_blocks=512, batch_max=32)
CHAT = [{"role": "user", "content": "hi"}]
CHAT_PROMPT = "user: hi\nassistant: "


def text(prompt: str, seed: int, count: int) -> str:
    """What the simulated model says."""
    return bytes(simulated_token(seed, len(prompt.encode()) + index) for index in range(count)).decode()


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(ENGINE, FrontendConfig(port=0, body_bytes_max=1 << 20, requests_max=64)) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False) as made:
        yield made


def settle(server: Served, seconds: float = 5.0) -> None:
    """Wait until nothing is in flight and every block is free."""
    until = time.monotonic() + seconds
    while len(server.backend.table) or server.backend.engine.load().used_blocks:
        assert time.monotonic() < until, (
            f"{len(server.backend.table)} streams, {server.backend.engine.load()}"
        )
        time.sleep(0.01)


def events(response: httpx.Response) -> list[Any]:
    """The data of a server-sent event stream, the last one [DONE]."""
    parts = response.text.split("\n\n")
    assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


class TestOpenAiClient:
    def test_models(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == ["simulated"]
        assert client.models.retrieve("simulated").owned_by == "llumnix"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")

    def test_completion(self, client: openai.OpenAI) -> None:
        made = client.completions.create(model="simulated", prompt="hello", max_tokens=20, seed=3)
        assert made.choices[0].text == text("hello", 3, 20) and made.choices[0].finish_reason == "length"
        assert made.usage is not None
        assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (
            5,
            20,
            25,
        )
        assert made.id.startswith("cmpl-") and made.object == "text_completion"

    def test_streamed_completion_with_usage(self, client: openai.OpenAI) -> None:
        options = {"include_usage": True}
        chunks = list(
            client.completions.create(
                model="simulated", prompt="hello", max_tokens=30, seed=3, stream=True, stream_options=options
            )
        )
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text("hello", 3, 30)
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + [
            "length"
        ]
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 30
        assert len({chunk.id for chunk in chunks}) == 1

    def test_chat(self, client: openai.OpenAI) -> None:
        made = client.chat.completions.create(
            model="simulated", messages=CHAT, max_completion_tokens=9, seed=1
        )
        assert made.choices[0].message.content == text(CHAT_PROMPT, 1, 9)
        assert made.choices[0].message.role == "assistant" and made.object == "chat.completion"

    def test_streamed_chat_of_several_choices(self, client: openai.OpenAI) -> None:
        chunks = client.chat.completions.create(
            model="simulated", messages=CHAT, max_tokens=12, seed=7, n=3, stream=True
        )
        said, roles, ends = ["", "", ""], [0, 0, 0], ["", "", ""]
        for chunk in chunks:
            choice = chunk.choices[0]
            said[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role == "assistant"
            ends[choice.index] += choice.finish_reason or ""
        assert said == [text(CHAT_PROMPT, 7 + index, 12) for index in range(3)]
        assert roles == [1, 1, 1] and ends == ["length"] * 3

    def test_prompts_choices_and_echo(self, client: openai.OpenAI) -> None:
        made = client.completions.create(
            model="simulated", prompt=["a", "bc"], n=2, echo=True, max_tokens=4, seed=5
        )
        expected = [prompt + text(prompt, 5 + number, 4) for prompt in ("a", "bc") for number in range(2)]
        assert [choice.text for choice in made.choices] == expected
        assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
        assert made.usage is not None and made.usage.prompt_tokens == 3 and made.usage.completion_tokens == 16

    def test_stop_string_ends_text_stream_and_generation(self, server: Served, client: openai.OpenAI) -> None:
        whole = text("hello", 3, 400)
        stop = whole[20:23]
        cut = whole.index(stop)
        options = {"include_usage": True}
        chunks = list(
            client.completions.create(
                model="simulated", prompt="hello", max_tokens=400, seed=3, stop=[stop, "@@"],
                stream=True, stream_options=options,
            )
        )  # fmt: skip
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole[:cut]
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage.completion_tokens == cut + 3
        settle(server, seconds=0.3)
        kept = client.completions.create(
            model="simulated", prompt="hello", max_tokens=400, seed=3, stop=stop,
            extra_body={"include_stop_str_in_output": True},
        )  # fmt: skip
        assert kept.choices[0].text == whole[: cut + 3]

    def test_stop_token_ends_the_text_before_it(self, client: openai.OpenAI) -> None:
        whole = text("hello", 3, 60)
        stop = whole[9]
        cut = whole.index(stop)
        made = client.completions.create(
            model="simulated",
            prompt="hello",
            max_tokens=60,
            seed=3,
            extra_body={"stop_token_ids": [ord(stop)]},
        )
        assert made.choices[0].text == whole[:cut] and made.choices[0].finish_reason == "stop"
        assert made.usage is not None and made.usage.completion_tokens == cut + 1

    def test_log_probabilities(self, client: openai.OpenAI) -> None:
        made = client.completions.create(model="simulated", prompt="ab", max_tokens=5, seed=3, logprobs=2)
        logprobs = made.choices[0].logprobs
        assert logprobs is not None and logprobs.tokens == list(text("ab", 3, 5))
        assert logprobs.token_logprobs == [0.0] * 5 and logprobs.text_offset == [0, 1, 2, 3, 4]
        chat = client.chat.completions.create(
            model="simulated", messages=CHAT, max_tokens=4, seed=3, logprobs=True, top_logprobs=1
        )
        content = chat.choices[0].logprobs.content
        assert [entry.token for entry in content] == list(text(CHAT_PROMPT, 3, 4))
        assert content[0].bytes == [ord(content[0].token)] and content[0].top_logprobs[0].logprob == 0.0

    def test_streamed_log_probabilities_add_up_to_the_whole(self, client: openai.OpenAI) -> None:
        chunks = client.completions.create(
            model="simulated", prompt="ab", max_tokens=9, seed=3, logprobs=1, stream=True, stop="@"
        )
        entries = [chunk.choices[0].logprobs for chunk in chunks]
        assert [token for entry in entries for token in entry.tokens] == list(text("ab", 3, 9))
        assert [offset for entry in entries for offset in entry.text_offset] == list(range(9))

    def test_async_clients_all_at_once(self, server: Served) -> None:
        async def one(client: openai.AsyncOpenAI, seed: int) -> bool:
            stream = await client.chat.completions.create(
                model="simulated", messages=CHAT, max_tokens=40, seed=seed, stream=True
            )
            said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return said == text(CHAT_PROMPT, seed, 40)

        async def all_of_them() -> list[bool]:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
                return await asyncio.gather(*[one(client, seed) for seed in range(40)])

        assert asyncio.run(all_of_them()) == [True] * 40
        settle(server)


class TestBadInput:
    @pytest.mark.parametrize(
        ("content", "status", "code"),
        [
            (b"{", 400, "invalid_json"),
            (b"", 400, "invalid_json"),
            (b'{"prompt": "\xff\xfe"}', 400, "invalid_json"),
            (b'{"prompt": "\\ud800"}', 400, "invalid_json"),
            (b"[" * 100_000, 400, "invalid_json"),
            (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
            (b'{"prompt": "x", "temperature": NaN}', 400, "invalid_value"),
            (b"[]", 400, "invalid_value"),
            (b'{"prompt": ""}', 400, "empty_prompt"),
            (b'{"prompt": "x", "model": "gpt-4"}', 404, "model_not_found"),
            (b'{"prompt": "' + b"x" * 600 + b'"}', 400, "context_length_exceeded"),
            (b'{"prompt": "' + b"x" * 2_000_000 + b'"}', 413, "body_too_large"),
        ],
    )
    def test_bad_bodies(self, http: httpx.Client, content: bytes, status: int, code: str) -> None:
        response = http.post("/v1/completions", content=content)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (status, code)
        assert set(error) == {"message", "type", "param", "code"}

    def test_a_body_without_length_is_bounded_too(self, http: httpx.Client) -> None:
        response = http.post("/v1/completions", content=(b"x" * 65536 for _ in range(40)))
        assert response.status_code == 413

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/nope", 404),
            ("GET", "/v1/completions", 405),
            ("POST", "/v1/models", 405),
            ("PUT", "/health", 405),
        ],
    )
    def test_wrong_routes(self, http: httpx.Client, method: str, path: str, status: int) -> None:
        response = http.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert status != 405 or response.headers["allow"]

    def test_the_client_library_raises_what_it_should(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="simulated", prompt="x", max_tokens=9999)
        assert caught.value.code == "context_length_exceeded" and caught.value.param == "max_tokens"

    def test_a_failure_of_ours_is_500_in_the_same_shape(self, server: Served, http: httpx.Client) -> None:
        class Broken:
            async def status(self) -> None:
                raise ZeroDivisionError("a bug")

        routes = server.backend.admin
        original = type(routes).status
        type(routes).status = Broken.status  # type: ignore[assignment, method-assign]
        try:
            response = http.get("/admin/status")
        finally:
            type(routes).status = original  # type: ignore[method-assign]
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error" and "bug" not in response.text


class TestCapacity:
    def test_more_than_the_frontend_takes_is_429(self, server: Served, http: httpx.Client) -> None:
        body = {"prompt": ["x"] * 5, "n": 16, "max_tokens": 100}
        for stream in (True, False):
            response = http.post("/v1/completions", json=body | {"stream": stream})
            assert response.status_code == 429 and response.json()["error"]["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1
            settle(server)

    def test_no_place_is_503(self, server: Served, http: httpx.Client) -> None:
        server.backend.placing = False
        try:
            for stream in (True, False):
                response = http.post("/v1/completions", json={"prompt": "x", "stream": stream})
                assert response.status_code == 503 and response.headers["retry-after"] == "3"
                assert response.json()["error"]["message"] == "no room anywhere"
        finally:
            server.backend.placing = True

    def test_a_failure_after_the_start_is_an_event(self, server: Served, http: httpx.Client) -> None:
        body = {"prompt": "x", "max_tokens": 500, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            (request_id,) = server.backend._streams
            server.loop.call_soon_threadsafe(server.backend.fail, request_id, "lost for good")
            rest = [line.removeprefix("data: ") for line in lines if line]
        assert response.status_code == 200 and rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["error"]["message"] == "lost for good"
        settle(server)


class TestClientsThatGoAway:
    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("n", [1, 3])
    def test_blocks_are_freed_at_once(self, server: Served, stream: bool, n: int) -> None:
        body = json.dumps({"prompt": "hello", "max_tokens": 500, "stream": stream, "n": n}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            until = time.monotonic() + 5
            while server.backend.engine.load().running < n:
                assert time.monotonic() < until
                time.sleep(0.005)
        settle(server, seconds=0.4)

    def test_a_slow_reader_neither_loses_tokens_nor_holds_the_engine_up(self, server: Served) -> None:
        body = json.dumps({"prompt": "hello", "max_tokens": 500, "stream": True, "seed": 3}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect((host, int(port)))
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
                % len(body) + body
            )  # fmt: skip
            settle(server, seconds=10.0)
            data = b""
            while part := raw.recv(65536):
                data += part
        lines = [line for line in data.decode().splitlines() if line.startswith("data: {")]
        said = "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines)
        assert said == text("hello", 3, 500)
