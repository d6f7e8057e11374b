"""The words in which the engine core, which decides about swapping, and a copier, which does it, talk.

A job copies whole KV blocks between the device pool and the host pool of one instance. The core decides what
is copied, from where to where, and which steps have to wait; the copier only copies. While a job runs, no
step may write its source blocks, or read or write its destination blocks: the core sees to that with
``StepPlan.wait_for``. Jobs keep out of each other's way by themselves.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class SwapDirection(Enum):
    """Where the bytes go."""

    OUT = "out"  # device to host
    IN = "in"  # host to device


@dataclass(frozen=True, slots=True)
class SwapJob:
    """Copy device block ``device_blocks[i]`` to host block ``host_blocks[i]``, or the other way, for every i.
    At least one block; none twice on a side. ``job_id`` is never used again on an instance."""

    job_id: int
    request_id: str
    direction: SwapDirection
    device_blocks: tuple[int, ...]
    host_blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SwapDone:
    """A job has ended. With an ``error`` the blocks at its destination hold garbage."""

    job_id: int
    error: str = ""


class Copier(Protocol):
    """Copies blocks in the background. Called by the engine's thread only."""

    @property
    def host_blocks(self) -> int:
        """Blocks of the host pool; 0: there is none, and no job may be begun."""
        ...

    def begin(self, jobs: Sequence[SwapJob]) -> None:
        """Queue jobs and return at once. Jobs of one direction are done in the order given, and a job waits
        for every earlier one that touches a block of its own. More than the queue takes end with an
        error."""
        ...

    def wait(self, job_ids: Collection[int]) -> None:
        """Block until these jobs have ended, well or not; those already reported are no matter."""
        ...

    def done(self) -> list[SwapDone]:
        """What has ended since the last call, in order of ending. Never waits."""
        ...

    def cost_s(self, blocks: int, runs: int) -> float:
        """Estimated seconds that one job takes once begun, for so many blocks in so many runs."""
        ...
