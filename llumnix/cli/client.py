"""The command line's side of the admin API: one HTTP call, and its failures in one line for people."""

import json
from typing import Any

import httpx

from llumnix.core.errors import LlumnixError

CONNECT_TIMEOUT_S = 5.0
QUESTION_TIMEOUT_S = 40.0  # longer than the server waits for the manager, so that its word is heard
ORDER_TIMEOUT_S = 1000.0  # scaling waits for models to load, or for requests to leave


class CommandFailed(LlumnixError):
    """The command could not be carried out; the text is all the user sees."""


class NotNow(CommandFailed):
    """The server is there but cannot answer at the moment, as while the manager restarts."""


class AdminClient:
    """Calls one server. Proxies from the environment are not used: the server is the user's own."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url.rstrip("/")
        headers = {"authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(QUESTION_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._http = httpx.Client(headers=headers, timeout=timeout, trust_env=False)

    def ask(self, path: str, **query: int | str) -> Any:
        """GET /admin/``path``. Raises CommandFailed."""
        return self._call("GET", path, params=query)

    def order(self, path: str, **body: str | int | dict[str, str]) -> Any:
        """POST /admin/``path``. Raises CommandFailed, with the reason if the order was refused."""
        timeout = httpx.Timeout(ORDER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        return self._call("POST", path, json=body, timeout=timeout)

    def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self._http.request(method, f"{self._url}/admin/{path}", **options)
        except httpx.ConnectError as error:
            raise CommandFailed(f"no server answers at {self._url}; start one with: llumnix serve") from error
        except httpx.TimeoutException as error:
            raise CommandFailed(f"the server at {self._url} did not answer in time") from error
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise CommandFailed(f"cannot call {self._url}: {error}") from error
        try:
            answer = response.json()
        except json.JSONDecodeError as error:
            raise CommandFailed(
                f"{self._url} is no llumnix server: it answered {response.status_code}"
            ) from error
        if response.is_success:
            return answer
        problem = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(problem, dict) or "message" not in problem:
            raise CommandFailed(f"{self._url} is no llumnix server: it answered {response.status_code}")
        hint = "; give it with --token or LLUMNIX_ADMIN_TOKEN" if response.status_code == 401 else ""
        kind = NotNow if response.status_code == 503 else CommandFailed
        raise kind(f"{problem['message']}{hint}")
