"""The devices of instances in a real Ray that is told of GPUs: reserved on one host, shown to the process of
the instance, kept when it is started again, given back when it is gone, and refused soon if none is free. In
a process of its own, since Ray is one per process."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

SCRIPT = """
import os, signal, time
import ray
from ray.exceptions import RayActorError
from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError
from llumnix.runtime import reservations
from llumnix.runtime.reservations import actor_options, give_back, reserved_ids

ray.init(address="local", num_gpus=4, num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="x")

@ray.remote(max_restarts=-1, lifetime="detached", namespace="x")
class Probe:
    def sees(self):
        return os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()

def refused(degree):
    "Why nothing is reserved within a second; what must succeed has the whole time."
    patience, reservations.RESERVE_TIMEOUT_S = reservations.RESERVE_TIMEOUT_S, 1.0
    try:
        actor_options(EngineConfig(kind="vllm", tensor_parallel=degree), "i2")
    except ConfigurationError as error:
        return str(error)
    finally:
        reservations.RESERVE_TIMEOUT_S = patience

def gpus_free(expected):
    give_up_at = time.monotonic() + 20
    while ray.available_resources().get("GPU", 0) != expected:
        assert time.monotonic() < give_up_at
        time.sleep(0.1)

pair = EngineConfig(kind="vllm", tensor_parallel=2)
probes = [Probe.options(name=name, **actor_options(pair, name)).remote() for name in ("i0", "i1")]
seen = [ray.get(probe.sees.remote()) for probe in probes]
assert sorted(",".join(devices for devices, _ in seen).split(",")) == ["0", "1", "2", "3"], seen
assert refused(2) == "tensor_parallel 2: no host has so many GPUs free"
assert refused(1) == "no host has a GPU free"
assert refused(8).endswith("no host of this Ray cluster has more than 4 GPUs")
assert reserved_ids() == ["i0", "i1"]

os.kill(seen[0][1], signal.SIGKILL)
again = None
while again is None or again[1] == seen[0][1]:
    try:
        again = ray.get(probes[0].sees.remote())
    except RayActorError:
        time.sleep(0.1)
assert again[0] == seen[0][0], (again, seen)
assert refused(2)

ray.kill(probes[0])
assert reserved_ids() == ["i0", "i1"], "a reservation outlives its actor"
assert actor_options(pair, "i0")["num_gpus"] == 2, "one left behind is replaced"
for name in ("i0", "i1", "i1"):
    give_back(name)
assert reserved_ids() == []
gpus_free(4)

single, on_cpu = EngineConfig(kind="torch"), EngineConfig(kind="torch", device="cpu")
singles = [Probe.options(**actor_options(single, name)).remote() for name in ("i5", "i6", "i7", "i8")]
assert sorted(ray.get(probe.sees.remote())[0] for probe in singles) == ["0", "1", "2", "3"]
assert refused(1)
give_back("i6")
assert actor_options(single, "i9")["num_gpus"] == 1
assert reserved_ids() == ["i5", "i7", "i8", "i9"]
assert actor_options(on_cpu, "i10")["num_gpus"] == 0
assert len(reserved_ids()) == 4, "a process on the CPU needs no reservation"
print("all held")
"""


def test_devices_are_reserved_kept_and_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip().endswith("all held"), done.stdout + done.stderr
