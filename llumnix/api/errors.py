"""Every refusal a client can get, in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``.

Routes raise ApiError; the app turns it, and every error of the framework's, into that JSON.
"""

import json
from math import ceil

from pydantic import ValidationError
from starlette.responses import Response

from llumnix.api.backend import FailKind, StreamFailed


class ApiError(Exception):
    """A refusal with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """The error as JSON."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """The error as an HTTP response, with Retry-After where coming back later helps."""
        headers = {"retry-after": str(max(1, ceil(self.retry_after_s)))} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(self.body(), self.status, headers, media_type="application/json")


def refused(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """The client asked for something wrong: 400."""
    return ApiError(400, message, param=param, code=code)


def stream_error(failure: StreamFailed) -> ApiError:
    """A stream's failure as the client is to see it."""
    if failure.kind is FailKind.INVALID:
        return refused(failure.reason)
    if failure.kind is FailKind.TOO_MANY:
        return ApiError(
            429,
            failure.reason,
            kind="rate_limit_error",
            code="too_many_requests",
            retry_after_s=failure.retry_after_s,
        )
    return ApiError(
        503,
        failure.reason,
        kind="service_unavailable_error",
        code="overloaded" if failure.kind is FailKind.OVERLOADED else "lost",
        retry_after_s=failure.retry_after_s,
    )


def validation_error(error: ValidationError) -> ApiError:
    """What is wrong with a body, naming the parameter. Of a value that may be of several types, each type's
    objection is reported; the one that got furthest is what the client meant."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    alike = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    worst = max(alike, key=lambda problem: _progress(problem["type"], problem["loc"]))
    if worst["type"] == "json_invalid":
        text = worst["msg"].removeprefix("Invalid JSON: ")
        return refused(f"the body is not valid JSON: {text}", code="invalid_json")
    where = [part for part in worst["loc"] if isinstance(part, int) or not _names_a_type(part)]
    param = (
        "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".") or None
    )
    text = worst["msg"].removeprefix("Value error, ")
    return refused(f"{param}: {text}" if param else text, param)


def _progress(kind: str, where: tuple[int | str, ...]) -> tuple[bool, int, int]:
    """How far checking got before it failed: past the type at all, how deep, how far along."""
    last = where[-1] if where else 0
    return (
        kind not in ("string_type", "list_type", "int_type"),
        len(where),
        last if isinstance(last, int) else 0,
    )


def _names_a_type(part: str) -> bool:
    """Pydantic puts the branch of a union it tried into the path; a client knows no branches."""
    return part in ("str", "int") or "[" in part or part.startswith(("TextPart", "function-"))
