"""The routes an OpenAI client knows, and /tokenize."""

import time
from typing import TypeVar
from uuid import uuid4

from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse, Response

from llumnix.api.answer import Answer
from llumnix.api.backend import Backend
from llumnix.api.errors import ApiError, refused, validation_error
from llumnix.api.intake import Choice, Intake
from llumnix.api.metrics import ApiMetrics
from llumnix.api.openai_schema import ChatBody, CompletionBody, Generation, TokenizeBody
from llumnix.api.render import ChatRenderer, CompletionRenderer
from llumnix.api.tokenizer import TextTokenizer
from llumnix.core.config import FrontendConfig
from llumnix.core.sampling import LOGPROBS_OFF

B = TypeVar("B", bound=BaseModel)


class OpenAiRoutes:
    """Everything under /v1. One per app."""

    def __init__(
        self, backend: Backend, tokenizer: TextTokenizer, metrics: ApiMetrics, config: FrontendConfig
    ) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._config = config
        self._intake = Intake(backend.model, tokenizer, config)
        self._started = int(time.time())
        self.router = APIRouter()
        self.router.add_api_route("/v1/models", self.models, methods=["GET"])
        self.router.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        self.router.add_api_route("/v1/completions", self.completions, methods=["POST"])
        self.router.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"])
        self.router.add_api_route("/tokenize", self.tokenize, methods=["POST"])

    async def models(self) -> Response:
        """The model, and its LoRA adapters as models of their own."""
        model = self._backend.model
        cards = [self._card(name) for name in (model.name, *model.adapters)]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, name: str) -> Response:
        """One of them, by name."""
        self._intake.adapter(name)
        return JSONResponse(self._card(name))

    async def completions(self, request: Request) -> Response:
        """Continue one or more prompts."""
        body = await self._body(request, CompletionBody)
        answer_id = f"cmpl-{uuid4().hex}"
        choices = await self._intake.completion(answer_id, body)
        return self._answer(answer_id, body, choices, CompletionRenderer)

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        body = await self._body(request, ChatBody)
        answer_id = f"chatcmpl-{uuid4().hex}"
        choices = await self._intake.chat(answer_id, body)
        return self._answer(answer_id, body, choices, ChatRenderer)

    async def tokenize(self, request: Request) -> Response:
        """A text's or a conversation's tokens, as the model would get them."""
        body = await self._body(request, TokenizeBody)
        self._intake.adapter(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise refused("give either prompt or messages", "prompt")
        if body.messages is not None:
            tokens = await self._intake.chat_tokens(body.messages)
        else:
            tokens = await self._intake.text_tokens(body.prompt or "")
        limit = self._backend.model.max_model_len
        return JSONResponse({"count": len(tokens), "max_model_len": limit, "tokens": list(tokens)})

    def _card(self, name: str) -> dict[str, str | int]:
        model = self._backend.model
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "llumnix",
            "max_model_len": model.max_model_len,
            **({} if name == model.name else {"parent": model.name}),
        }

    def _answer(
        self,
        answer_id: str,
        body: Generation,
        choices: list[Choice],
        kind: type[CompletionRenderer] | type[ChatRenderer],
    ) -> Answer:
        renderer = kind(
            answer_id,
            int(time.time()),
            body.model or self._backend.model.name,
            self._tokenizer.table,
            wants_usage=body.wants_usage,
            wants_logprobs=body.logprobs_wanted != LOGPROBS_OFF,
        )
        return Answer(
            self._backend, self._tokenizer, self._metrics, body=body, choices=choices, renderer=renderer
        )

    async def _body(self, request: Request, kind: type[B]) -> B:
        data = await read_body(request, self._config.body_bytes_max)
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            raise validation_error(error) from error


async def read_body(request: Request, bytes_max: int) -> bytes:
    """A request's body; 413 past ``bytes_max``, whatever its headers claim."""
    data = bytearray()
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) <= bytes_max:
        async for part in request.stream():
            data += part
            if len(data) > bytes_max:
                break
        else:
            return bytes(data)
    raise ApiError(413, f"the body is larger than {bytes_max} bytes", code="body_too_large")
