"""Where an instance's process goes in the Ray cluster, and what it takes there.

An instance on GPUs, or that spans several devices (tensor parallelism), gets a placement group of one bundle
that holds them all. A group, though one GPU could be asked for like any actor does: whether a group is to be
had shows in time, while an actor for which nothing is free is pending for ever. One bundle, not one per rank:
an actor takes what it needs from a single bundle, and Ray shows its process (CUDA_VISIBLE_DEVICES) only what
is in there; ranks are that process's children. A bundle is never split over hosts, and Ray puts each new one
where most is free. The group outlives the process, so that an instance that is started again finds its
devices free, and the manager, so it must be given back by name when its instance is gone for good. Called by
the manager's actor.
"""

from collections.abc import Sequence
from typing import Any

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import get_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError

PREFIX = "llumnix-devices:"
CPU_SHARE = 0.001  # Ray spreads over nodes only what asks for something
RESERVE_TIMEOUT_S = 30.0
"""How long devices that some host has may be taken by others, before an instance does not start."""


def actor_options(config: EngineConfig, instance_id: str) -> dict[str, Any]:
    """What an instance's actor needs, reserved first unless it is one CPU process. Waits at most
    RESERVE_TIMEOUT_S. Raises ConfigurationError if the devices are not to be had."""
    on_gpus = config.kind != "simulated" and config.device != "cpu" and "GPU" in ray.cluster_resources()
    needs = bundle(config.tensor_parallel, on_gpus=on_gpus)
    options = {"num_cpus": needs["CPU"], "num_gpus": int(needs.get("GPU", 0))}
    if config.tensor_parallel == 1 and not on_gpus:
        return {**options, "scheduling_strategy": "SPREAD"}
    if on_gpus:
        check_hosts(config.tensor_parallel, [_gpus(node) for node in ray.nodes() if node["Alive"]])
    give_back(instance_id)
    group = placement_group([needs], "STRICT_PACK", name=PREFIX + instance_id, lifetime="detached")
    if not group.wait(RESERVE_TIMEOUT_S):
        remove_placement_group(group)
        raise ConfigurationError(none_free(config.tensor_parallel))
    strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=False)
    return {**options, "scheduling_strategy": strategy}


def bundle(degree: int, *, on_gpus: bool) -> dict[str, float]:
    """What an instance takes of a host: a GPU for each rank if there are any. On a CPU nothing that counts,
    as instances share its cores."""
    needs = {"CPU": CPU_SHARE}
    return {**needs, "GPU": float(degree)} if on_gpus else needs


def none_free(degree: int) -> str:
    """What is said once RESERVE_TIMEOUT_S have passed."""
    if degree == 1:
        return "no host has a GPU free"
    return f"tensor_parallel {degree}: no host has so many GPUs free"


def check_hosts(degree: int, gpus: Sequence[float]) -> None:
    """Raises ConfigurationError if no host, with so many GPUs each, can ever hold an instance."""
    most = int(max(gpus, default=0))
    if degree > most:
        raise ConfigurationError(
            f"tensor_parallel {degree}: an instance does not span hosts, and no host of this Ray cluster has "
            f"more than {most} GPUs"
        )


def give_back(instance_id: str) -> None:
    """Free what is reserved for an instance, if anything is; what still runs there is killed."""
    try:
        remove_placement_group(get_placement_group(PREFIX + instance_id))
    except ValueError:
        pass  # nothing is


def reserved_ids() -> list[str]:
    """The instances that something is reserved for."""
    rows = placement_group_table().values()
    names = [row["name"] for row in rows if row["state"] != "REMOVED"]
    return sorted(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))


def _gpus(node: dict[str, Any]) -> float:
    return float(node["Resources"].get("GPU", 0))
