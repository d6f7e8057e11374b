"""Which swap jobs have to wait for which: those that touch a block of an earlier one, on either side.

Pure, for copiers only: the one that copies and the one in virtual time. Holds as much as the outstanding jobs
have blocks.
"""

from llumnix.core.errors import InvariantError
from llumnix.instance.swap import SwapJob


class SwapOrder:
    """The outstanding jobs and the last of them to touch each block."""

    def __init__(self) -> None:
        self._outstanding: dict[int, SwapJob] = {}
        self._last_on_device: dict[int, int] = {}
        self._last_on_host: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._outstanding)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._outstanding

    def begin(self, job: SwapJob) -> set[int]:
        """Enter a job. Returns the outstanding ones that it has to wait for. Raises InvariantError for a job
        that makes no sense."""
        if job.job_id in self._outstanding:
            raise InvariantError(f"swap job {job.job_id} was begun twice")
        if not job.device_blocks or len(job.device_blocks) != len(job.host_blocks):
            raise InvariantError(
                f"swap job {job.job_id} pairs {len(job.device_blocks)} device blocks with "
                f"{len(job.host_blocks)} host blocks"
            )
        before: set[int] = set()
        for last, blocks in (
            (self._last_on_device, job.device_blocks),
            (self._last_on_host, job.host_blocks),
        ):
            before.update(last[block] for block in blocks if block in last)
            last.update(dict.fromkeys(blocks, job.job_id))
        self._outstanding[job.job_id] = job
        return before

    def end(self, job_id: int) -> None:
        """A job is over."""
        job = self._outstanding.pop(job_id)
        for last, blocks in (
            (self._last_on_device, job.device_blocks),
            (self._last_on_host, job.host_blocks),
        ):
            for block in blocks:
                if last.get(block) == job_id:
                    del last[block]
