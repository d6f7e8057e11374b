"""The copies between device and host memory that are under way on one instance: which blocks they use, and
what the next step has to wait for.

A job is known from the plan it was put into until the copier says that it has ended. Called by switching.py
only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llumnix.core.errors import InvariantError
from llumnix.instance.block_manager import BlockManager
from llumnix.instance.host_cache import HostCopy
from llumnix.instance.swap import SwapDirection, SwapDone, SwapJob


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that has ended, well or not, and the copy it was from or to."""

    job: SwapJob
    copy: HostCopy
    error: str


class SwapLedger:
    """See the module. ``blocks`` is the device pool."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._under_way: dict[int, tuple[SwapJob, HostCopy]] = {}
        self._new: list[SwapJob] = []
        self._must_end: set[int] = set()
        self._job_ids = 0
        self._begun = {SwapDirection.OUT: 0, SwapDirection.IN: 0}

    def __len__(self) -> int:
        return len(self._under_way)

    def under_way(self, direction: SwapDirection) -> bool:
        """Whether a job of this direction has been put into a plan and not ended."""
        return any(job.direction is direction for job, _ in self._under_way.values())

    def fills(self, copy: HostCopy) -> bool:
        """Whether a job that writes to a copy has been put into a plan and not ended."""
        jobs = self._under_way.values()
        return any(to is copy and job.direction is SwapDirection.OUT for job, to in jobs)

    def begun(self, direction: SwapDirection) -> int:
        """Blocks begun to be copied for the plan in the making."""
        return self._begun[direction]

    def begin(
        self,
        request_id: str,
        direction: SwapDirection,
        copy: HostCopy,
        device_blocks: Sequence[int],
        host_blocks: Sequence[int],
    ) -> int:
        """Put a job into the next plan; its id."""
        self._job_ids += 1
        job = SwapJob(self._job_ids, request_id, direction, tuple(device_blocks), tuple(host_blocks))
        self._blocks.copy_begins(job.job_id, job.device_blocks)
        self._under_way[job.job_id] = job, copy
        self._new.append(job)
        self._begun[direction] += len(job.device_blocks)
        return job.job_id

    def must_end(self, job_ids: Iterable[int]) -> None:
        """The next step may not compute before these have ended."""
        self._must_end.update(job_ids)

    def conflicts(self) -> set[int]:
        """The jobs that use blocks given out since the last call. The caller says who waits for them."""
        found, self._blocks.conflicts = self._blocks.conflicts, set()
        return found

    def orders(self, wait_for_all: bool) -> tuple[tuple[SwapJob, ...], tuple[int, ...]]:
        """The jobs and the waits of the plan that is complete now."""
        self.must_end(self.conflicts())
        wanted = self._under_way.keys() if wait_for_all else self._must_end & self._under_way.keys()
        jobs, self._new, self._must_end = tuple(self._new), [], set()
        self._begun = dict.fromkeys(self._begun, 0)
        return jobs, tuple(sorted(wanted))

    def ended(self, done: SwapDone) -> Ended:
        """The copier has reported a job. Raises InvariantError if there is none such."""
        found = self._under_way.pop(done.job_id, None)
        if found is None:
            raise InvariantError(f"swap job {done.job_id} has ended and was not under way")
        job, copy = found
        self._blocks.copy_ends(job.job_id, job.device_blocks)
        return Ended(job, copy, done.error)
