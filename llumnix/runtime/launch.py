"""Starts a whole cluster and serves HTTP until told to stop: what `llumnix serve` runs.

The order matters: what can fail for the user's reasons (settings, model, port) is tried before anything is
started, and whatever was started is stopped again, on success, error and Ctrl-C alike.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from llumnix.api.backend import Admin, ModelInfo, StreamCall
from llumnix.api.server import ApiServer
from llumnix.core.admin import MoveSeen, Refusal
from llumnix.core.config import Config
from llumnix.core.errors import ConfigurationError
from llumnix.runtime.actors import MANAGER_NAME, NAMESPACE, STOP_TIMEOUT_S, free_port, on_this_host
from llumnix.runtime.fleet import instance_ids, last_line, stop_instance
from llumnix.runtime.frontend import BusStream, Frontend
from llumnix.runtime.manager_actor import ClusterDescription, RemoteManager
from llumnix.runtime.model_info import model_info
from llumnix.runtime.ray_admin import RayAdmin

REACH_TIMEOUT_S = 10.0
JOIN_ATTEMPTS = "RAY_gcs_server_port_wait_time_s"  # what Ray calls the number of them

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A cluster whose instances all serve."""

    manager: ActorHandle


@contextlib.contextmanager
def running_cluster(config: Config) -> Iterator[RunningCluster]:
    """Start (or join) Ray, the manager and the instances; stop them at the end. Raises ConfigurationError
    with the reason, in one line, if they cannot all serve."""
    started_ray = start_ray(config)
    manager = None
    try:
        if find_manager() is not None:
            raise ConfigurationError("this Ray cluster already runs Llumnix; stop that one first")
        host = on_this_host(config).cluster.bind_host
        manager = RemoteManager.options(
            name=MANAGER_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=64,
            scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            ),
        ).remote(config, free_port(host))
        try:
            outcome = ray.get(manager.scale.remote(config.cluster.instances))
        except RayActorError as error:
            raise ConfigurationError(f"the manager did not start: {last_line(error)}") from error
        if isinstance(outcome, Refusal):
            raise ConfigurationError(outcome.reason)
        yield RunningCluster(manager)
    finally:
        if manager is not None:
            stop_cluster(manager)
        if started_ray:
            ray.shutdown()


def start_ray(config: Config) -> bool:
    """Join the cluster named in the configuration or start one on this machine. True: this process now owns a
    connection that it must shut down."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # its default, 15, lets any other process slow engines
    address = config.cluster.ray_address
    if address not in ("", "auto"):
        os.environ.pop("RAY_ADDRESS", None)  # Ray would prefer it to the address it is given
    check_reachable(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
    try:
        if address:
            with one_attempt():
                ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
        else:  # without "local" Ray would join whatever cluster was started last on this machine
            ray.init(
                address="local",
                namespace=NAMESPACE,
                log_to_driver=False,
                include_dashboard=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # Ray raises a bare one when its node does not come up
        if not address:
            raise ConfigurationError(f"Ray did not start: {error}") from error
        hint = "" if "RAY_AUTH_MODE" in os.environ else "; if it wants a token, set RAY_AUTH_MODE=token"
        raise ConfigurationError(f"cannot join the Ray cluster {address!r}: {error}{hint}") from error
    return True


def check_reachable(address: str) -> None:
    """Raise ConfigurationError if nobody listens at ``address``, HOST:PORT: Ray would try for minutes. What
    is not of that form is Ray's to judge."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigurationError(f"no Ray cluster answers at {address}: {error}") from error


@contextlib.contextmanager
def one_attempt() -> Iterator[None]:
    """Within it Ray tries to join a cluster once, which takes 40 s where somebody listens and does not
    answer, instead of twenty times."""
    before = os.environ.get(JOIN_ATTEMPTS)
    os.environ.setdefault(JOIN_ATTEMPTS, "1")
    try:
        yield
    finally:
        if before is None:
            del os.environ[JOIN_ATTEMPTS]


def find_manager() -> ActorHandle | None:
    """The manager of the Ray cluster this process is connected to, if it runs one."""
    try:
        return ray.get_actor(MANAGER_NAME, namespace=NAMESPACE)
    except ValueError:
        return None


def stop_cluster(manager: ActorHandle) -> None:
    """Stop all instances, then the manager, then what it left behind: instances outlive both it and this
    process. Does not wait for requests: drain first to keep them."""
    try:
        ray.wait([manager.stop.remote()], timeout=2 * STOP_TIMEOUT_S)
        ray.kill(manager)
    except RayError as error:
        log.warning("the manager was gone before it could be stopped: %s", last_line(error))
    for instance_id in instance_ids():
        stop_instance(instance_id, orderly=False)


class ClusterBackend:
    """The Backend of the HTTP layer: a frontend on the bus, and the manager's actor."""

    def __init__(self, frontend: Frontend, admin: RayAdmin, model: ModelInfo) -> None:
        self._frontend = frontend
        self.admin: Admin = admin
        self.model = model

    @property
    def ready(self) -> bool:
        """See Backend."""
        return self._frontend.ready

    @property
    def moves(self) -> tuple[MoveSeen, ...]:
        """See Backend."""
        return tuple(self._frontend.table.moves)

    def open(self, call: StreamCall) -> BusStream:
        """See Backend."""
        return self._frontend.open(call)


def serve(config: Config) -> int:
    """Run until SIGINT or SIGTERM. Returns the process's exit status. Raises ConfigurationError, in one line,
    with nothing left running, if the cluster cannot be started as configured."""
    server = ApiServer(config.frontend, model_info(config.engine, config.frontend.served_model_name))
    try:
        with terminated_as_interrupt(), running_cluster(config) as cluster:
            asyncio.run(serve_http(config, cluster, server))
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
    return 0


async def serve_http(config: Config, cluster: RunningCluster, server: ApiServer) -> None:
    """Answer HTTP until a signal says to stop. Raises what the frontend failed with, if that ended it."""
    description: ClusterDescription = await cluster.manager.describe.remote()
    model = model_info(config.engine, config.frontend.served_model_name, description.max_model_len)
    frontend = Frontend(
        on_this_host(config),
        frontend_id=f"http-{uuid.uuid4().hex[:8]}",
        manager_address=description.manager_address,
        on_failure=lambda error: stop_serving(server, frontend),
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop_serving, server, frontend)
    try:
        where = f"{server.url}/v1, Ray {ray.get_runtime_context().gcs_address}"
        admin = RayAdmin(cluster.manager)
        for row in await admin.instances():
            if row.swap is not None:
                tokens = row.swap.host_capacity * config.engine.block_size
                print(f"{row.instance_id} keeps KV of up to {tokens} tokens in host memory")
        print(f"{model.name} on {config.cluster.instances} instances: {where}", flush=True)
        await server.serve(ClusterBackend(frontend, admin, model))
        if frontend.failure is not None:
            raise frontend.failure
    finally:
        await frontend.close()


def stop_serving(server: ApiServer, frontend: Frontend) -> None:
    """End the streams with a word to their clients, then the server."""
    frontend.stop()
    server.stop()


@contextlib.contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C does, so that everything started is stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
