"""The HTTP server around the application: where it may listen, and how it is tuned."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from llumnix.api.app import create_app
from llumnix.api.backend import Backend, ModelInfo
from llumnix.api.tokenizer import load_tokenizer
from llumnix.core.config import FrontendConfig
from llumnix.core.errors import ConfigurationError

BACKLOG = 4096  # connections the kernel keeps for us; a burst of clients arrives at once
KEEP_ALIVE_S = 75
SHUTDOWN_S = 5


def check_listening(config: FrontendConfig) -> None:
    """Raise ConfigurationError if the server would offer admin calls to others than this host without a
    token."""
    if config.admin_token or config.host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigurationError(
            f"listening on {config.host} needs an admin_token, since others can reach it"
        )


def open_socket(config: FrontendConfig) -> socket.socket:
    """A listening socket on the configured address; port 0 takes a free one. Raises ConfigurationError."""
    check_listening(config)
    try:
        infos = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiServer:
    """The API of one model on one socket. Making it takes the port and reads the tokenizer, so that what is
    wrong with either shows before anything else is started; connections wait until ``serve``. uvloop and
    httptools are used where they are installed."""

    def __init__(self, config: FrontendConfig, model: ModelInfo) -> None:
        self._config = config
        self._socket = open_socket(config)
        self._tokenizer = load_tokenizer(model.tokenizer_folder)
        self._server: uvicorn.Server | None = None
        self._stopped = False

    @property
    def url(self) -> str:
        """Where clients on this host reach it, without /v1."""
        host, port = self._socket.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def serve(self, backend: Backend) -> None:
        """Answer calls until ``stop``; then finish or, after a few seconds, cut off those in progress.
        Signals are the caller's business."""
        app = create_app(backend, self._config, self._tokenizer)
        config = uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            lifespan="off",
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        self._server = _Server(config)
        self._server.should_exit = self._stopped
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Make ``serve`` return soon."""
        self._stopped = True
        if self._server is not None:
            self._server.should_exit = True

    def close(self) -> None:
        """Give the port back, for a server that never came to serve."""
        self._socket.close()
