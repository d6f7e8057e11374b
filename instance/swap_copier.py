"""Copies KV blocks between an instance's device pool and its host pool, in the background.

One worker thread per direction, so that blocks come in while others go out; each does one job at a time and
copies without the interpreter's lock. Which jobs wait for which: swap_order.py. Made by executors together
with the two pools, which must outlive it; called by the engine's thread (see ``swap.Copier``).
"""

import logging
import threading
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Final

from llumnix.core.config import SwapConfig
from llumnix.core.errors import InvariantError
from llumnix.instance.copy_ladder import CopyTotals
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.swap import SwapDirection, SwapDone, SwapJob
from llumnix.instance.swap_lane import SwapLane
from llumnix.instance.swap_order import SwapOrder

JOBS_MAX: Final = 4096

log = logging.getLogger(__name__)


class SwapCopier:
    """See Copier. Every job that was begun is reported once, also if it fails or the copier is closed."""

    def __init__(self, device_pool: KvPool, host_pool: KvPool, config: SwapConfig) -> None:
        """Measures the copies, so the pools must still be all zeros. Raises ConfigurationError."""
        self._pools = {"device": device_pool.layout.blocks, "host": host_pool.layout.blocks}
        self._lanes = [SwapLane(direction, device_pool, host_pool, config) for direction in SwapDirection]
        self._changed = threading.Condition()
        self._order = SwapOrder()
        self._queues: dict[SwapDirection, deque[tuple[SwapJob, set[int]]]] = {
            direction: deque() for direction in SwapDirection
        }
        self._ended: list[SwapDone] = []
        self._closing = False
        self._workers = [
            threading.Thread(
                target=self._work, args=(lane,), name=f"swap-{lane.direction.value}", daemon=True
            )
            for lane in self._lanes
        ]
        for worker in self._workers:
            worker.start()

    @property
    def host_blocks(self) -> int:
        return self._pools["host"]

    def begin(self, jobs: Sequence[SwapJob]) -> None:
        """See Copier. Raises InvariantError for a job that makes no sense."""
        for job in jobs:
            for pool, blocks in (("device", job.device_blocks), ("host", job.host_blocks)):
                if blocks and not 0 <= min(blocks) <= max(blocks) < self._pools[pool]:
                    raise InvariantError(f"swap job {job.job_id} names a block beyond the {pool} pool")
        with self._changed:
            for job in jobs:
                if self._closing or len(self._order) >= JOBS_MAX:
                    why = "the copier is closed" if self._closing else f"{JOBS_MAX} jobs are queued already"
                    self._ended.append(SwapDone(job.job_id, why))
                else:
                    self._queues[job.direction].append((job, self._order.begin(job)))
            self._changed.notify_all()

    def wait(self, job_ids: Collection[int]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not any(job_id in self._order for job_id in job_ids))

    def done(self) -> list[SwapDone]:
        with self._changed:
            ended, self._ended = self._ended, []
        return ended

    def cost_s(self, blocks: int, runs: int) -> float:
        """The mean of both directions: what is swapped out comes in again."""
        return sum(lane.ladder.cost_s(blocks, runs) for lane in self._lanes) / len(self._lanes)

    def totals(self) -> dict[SwapDirection, CopyTotals]:
        """What was done so far, by direction."""
        with self._changed:
            return {lane.direction: replace(lane.totals) for lane in self._lanes}

    def close(self) -> None:
        """Finish the copies under way and drop the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()

    # Worker threads.

    def _work(self, lane: SwapLane) -> None:
        queue = self._queues[lane.direction]
        try:
            while (job := self._next(queue)) is not None:
                self._do(lane, job)
        finally:
            with self._changed:
                self._closing = True
                while queue:
                    self._end(queue.popleft()[0].job_id, "the copier was closed")

    def _do(self, lane: SwapLane, job: SwapJob) -> None:
        error, began = "the copier's thread failed", perf_counter()
        try:
            lane.copy(job)
            error = ""
        except (RuntimeError, OSError, MemoryError, ValueError) as fault:  # torch's are RuntimeErrors
            error = str(fault) or type(fault).__name__
            log.warning("swap job %d of %s failed: %s", job.job_id, job.request_id, error)
        finally:
            with self._changed:
                totals = lane.totals
                totals.jobs += 1
                totals.blocks += len(job.device_blocks)
                totals.errors += bool(error)
                totals.busy_s += perf_counter() - began
                self._end(job.job_id, error)

    def _next(self, queue: deque[tuple[SwapJob, set[int]]]) -> SwapJob | None:
        """The next job of a direction once all it waits for have ended; None: the copier is closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or (bool(queue) and self._free(queue[0][1])))
            return None if self._closing else queue.popleft()[0]

    def _free(self, before: set[int]) -> bool:
        return not any(job_id in self._order for job_id in before)

    def _end(self, job_id: int, error: str) -> None:
        self._order.end(job_id)
        self._ended.append(SwapDone(job_id, error))
        self._changed.notify_all()
