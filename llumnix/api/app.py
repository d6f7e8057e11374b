"""The HTTP application: routes, error shapes, health and metrics. Made once per frontend process."""

import asyncio
import logging
import time
from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llumnix import __version__
from llumnix.api.admin_routes import EVENTS_MAX, AdminRoutes
from llumnix.api.backend import Backend, ManagerAway
from llumnix.api.errors import ApiError
from llumnix.api.metrics import ApiMetrics
from llumnix.api.openai_routes import OpenAiRoutes
from llumnix.api.tokenizer import TextTokenizer, load_tokenizer
from llumnix.core.admin import InstanceRow
from llumnix.core.config import FrontendConfig
from llumnix.observe.metrics import ClusterMetrics

MANAGER_RETRY_AFTER_S = 2.0
SCRAPE_TIMEOUT_S = 5.0
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

log = logging.getLogger(__name__)


class _CountCalls:
    """Counts each call by its route and status. Plain ASGI: adds one closure per call and nothing per
    chunk."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._metrics.call(getattr(route, "path", "unknown"), message["status"])
            await send(message)

        await self._app(scope, receive, counted)


def create_app(backend: Backend, config: FrontendConfig, tokenizer: TextTokenizer | None = None) -> FastAPI:
    """The application over a backend. The tokenizer is loaded from the model's folder unless given."""
    tokenizer = tokenizer or load_tokenizer(backend.model.tokenizer_folder)
    metrics, cluster = ApiMetrics(time.monotonic), ClusterMetrics()
    app = FastAPI(title="Llumnix", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(OpenAiRoutes(backend, tokenizer, metrics, config).router)
    app.include_router(AdminRoutes(backend, config.admin_token).router)

    async def health() -> Response:
        """200 once requests can be served."""
        if backend.ready:
            return JSONResponse({"status": "ok"})
        raise ApiError(503, "no instance is ready yet", kind="service_unavailable_error", code="not_ready")

    async def version() -> Response:
        """This package's version."""
        return JSONResponse({"version": __version__})

    async def metrics_page() -> Response:
        """Prometheus' exposition format; without news of the instances while the manager is away. Whoever
        scrapes does not wait as long as an administrator."""
        rows: tuple[InstanceRow, ...] = ()
        try:
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                rows = await backend.admin.instances()
                cluster.update(await backend.admin.status(), rows)
                cluster.take(await backend.admin.events(cluster.last_event, EVENTS_MAX))
        except (ManagerAway, TimeoutError):
            pass
        return Response(metrics.page(rows) + cluster.render(), media_type=METRICS_TYPE)

    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/version", version, methods=["GET"])
    app.add_api_route("/metrics", metrics_page, methods=["GET"])
    app.add_middleware(_CountCalls, metrics=metrics)
    _shape_errors(app)
    return app


def _shape_errors(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def manager_away(request: Request, error: Exception) -> Response:
        return ApiError(
            503,
            f"{error}; serving goes on",
            kind="service_unavailable_error",
            code="manager_away",
            retry_after_s=MANAGER_RETRY_AFTER_S,
        ).response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path}"
        text = {404: f"there is no route {where}", 405: f"the method of {where} is not allowed"}
        message = text.get(error.status_code, HTTPStatus(error.status_code).phrase)
        response = ApiError(error.status_code, message, code=f"http_{error.status_code}").response()
        response.headers.update(error.headers or {})
        return response

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def internal(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(500, "internal error", kind="server_error", code="internal_error").response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(ManagerAway, manager_away)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, internal)
