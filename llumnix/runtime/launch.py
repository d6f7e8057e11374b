"""Starts a whole cluster and serves HTTP until told to stop: what `llumnix serve` runs.

The order matters: what can fail for the user's reasons (settings, model, port) is tried before anything is started,
and whatever was started is stopped again, on success, error and Ctrl-C alike.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from llumnix.api.server import ApiServer
from llumnix.core.admin import Refusal
from llumnix.core.config import Config
from llumnix.core.errors import ConfigurationError
from llumnix.runtime.actors import MANAGER_NAME, NAMESPACE, STOP_TIMEOUT_S, free_port, on_this_host
from llumnix.runtime.frontend import Frontend, RayAdmin, model_info
from llumnix.runtime.manager_actor import ManagerActor, last_line

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A cluster that serves: its manager's actor and where the manager's bus listens."""

    manager: "ActorHandle[ManagerActor]"
    manager_address: str


@contextlib.contextmanager
def running_cluster(config: Config) -> Iterator[RunningCluster]:
    """Start (or join) Ray, the manager and the instances; stop them at the end. Raises ConfigurationError with the
    reason, in one line, if they cannot all serve."""
    started_ray = start_ray(config)
    manager = None
    try:
        if find_manager() is not None:
            raise ConfigurationError("this Ray cluster already runs Llumnix; stop that one first")
        host = on_this_host(config).cluster.bind_host
        manager = ManagerActor.options(
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
            address = ray.get(manager.describe.remote()).manager_address
        except RayActorError as error:
            raise ConfigurationError(f"the manager did not start: {last_line(error)}") from error
        if isinstance(outcome, Refusal):
            raise ConfigurationError(outcome.reason)
        yield RunningCluster(manager, address)
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
    try:
        if config.cluster.ray_address:
            ray.init(address=config.cluster.ray_address, namespace=NAMESPACE, log_to_driver=False)
        else:
            ray.init(
                namespace=NAMESPACE, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR
            )
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise ConfigurationError(f"Ray did not start: {error}") from error
    return True


def find_manager() -> "ActorHandle[ManagerActor] | None":
    """The manager of the Ray cluster this process is connected to, if it runs one."""
    try:
        return ray.get_actor(MANAGER_NAME, namespace=NAMESPACE)
    except ValueError:
        return None


def stop_cluster(manager: "ActorHandle[ManagerActor]") -> None:
    """Stop all instances, then the manager. Does not wait for requests: drain first to keep them."""
    try:
        ray.wait([manager.stop.remote()], timeout=2 * STOP_TIMEOUT_S)
        ray.kill(manager)
    except RayError as error:
        log.warning("the manager was gone before it could be stopped: %s", last_line(error))


def serve(config: Config) -> int:
    """Run until SIGINT or SIGTERM. Returns the process's exit status. Raises ConfigurationError before anything is
    left running."""
    model = model_info(config)
    server = ApiServer(config.frontend, model)
    with stop_on_signals(), running_cluster(config) as cluster:
        asyncio.run(serve_http(config, cluster, server))
    return 0
