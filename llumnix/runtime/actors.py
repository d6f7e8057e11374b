"""The Ray actors: the manager (one per cluster) and the instances. Ray starts them, finds them by name, and
starts them again when their process dies.

Nothing travels through Ray but orders and answers of administrators; tokens, load and KV take the bus. An
actor's constructor does all its work, since it is what Ray runs again after a crash. Names are fixed, so that
a restarted manager finds the instances that are already there.
"""

import os
import socket
import time
import uuid
from dataclasses import dataclass, replace

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from llumnix.core.config import Config
from llumnix.core.errors import ConfigurationError
from llumnix.runtime.instance_factory import InstanceIdentity, make_instance
from llumnix.runtime.loop_thread import LoopThread, end_process

NAMESPACE = "llumnix"
MANAGER_NAME = "manager"
INSTANCE_PREFIX = "instance:"
STOP_TIMEOUT_S = 20.0
WATCH_S = 20.0


def actor_name(instance_id: str) -> str:
    """The Ray name of an instance's actor."""
    return INSTANCE_PREFIX + instance_id


def find_instance(instance_id: str) -> ActorHandle:
    """The handle of a living or restarting instance. Raises ValueError if there is none of that name."""
    return ray.get_actor(actor_name(instance_id), namespace=NAMESPACE)


def tell_starting(instance_id: str) -> None:
    """Let the manager know of a process that begins. Not waited for: it may be away."""
    try:
        ray.get_actor(MANAGER_NAME, namespace=NAMESPACE).starting.remote(instance_id)
    except (ValueError, RayError):
        pass  # an actor whose constructor raises is not started again


def on_this_host(config: Config) -> Config:
    """The configuration with ``bind_host`` "node" replaced by the address of the Ray node this process is
    on."""
    if config.cluster.bind_host != "node":
        return config
    host = ray.util.get_node_ip_address()
    return replace(config, cluster=replace(config.cluster, bind_host=host))


def free_port(host: str) -> int:
    """A port that nobody listens on at ``host`` right now."""
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ConfigurationError(
                f"bind_host {host} is not an address of this machine: {error}"
            ) from error
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class ProcessName:
    """Which process stands behind an instance at the moment, and whether it is to be stopped once empty."""

    incarnation: str
    pid: int
    leaving: bool = False


class InstanceActor:
    """One instance. A failing engine thread ends the process, so that Ray starts a clean one."""

    def __init__(self, config: Config, instance_id: str, manager_address: str) -> None:
        tell_starting(instance_id)
        self._process = ProcessName(incarnation=uuid.uuid4().hex[:12], pid=os.getpid())
        self._loop = LoopThread("instance-io", end_process)
        identity = InstanceIdentity(instance_id, self._process.incarnation, manager_address)
        self._instance = self._loop.run(make_instance(on_this_host(config), identity, on_failure=end_process))
        self._instance.server.start()

    def process(self) -> ProcessName:
        """Answered once the constructor is through: the instance serves."""
        return self._process

    def watch(self, incarnation: str) -> ProcessName:
        """Say which process this is: at once if it is another than ``incarnation``, else after a long wait,
        so that the call fails when the process dies. Bounded, since a caller that died leaves its call behind
        here."""
        if incarnation == self._process.incarnation:
            time.sleep(WATCH_S)
        return self._process

    def leave(self, leaving: bool) -> None:
        """Remember that it is to be stopped once empty, or not any more, for a manager that forgets."""
        self._process = replace(self._process, leaving=leaving)

    def stop(self) -> None:
        """Leave the bus in order. The actor is killed right after."""
        self._loop.run(self._instance.close(), STOP_TIMEOUT_S)


RemoteInstance = ray.remote(InstanceActor)
