"""Host memory in the small world (migration_world.py): the content of every host block, copied to and from
the device's in virtual time, one job after the other."""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from llumnix.core.messages.control import RequestStatus
from llumnix.instance.swap import SwapDirection, SwapDone, SwapJob

if TYPE_CHECKING:
    from migration_node import KvStamp, Node

COPY_S = (0.0005, 0.05)
FAILED_COPIES = 0.02


class HostMemory:
    """A Copier. What a job copies is what lies there when it ends, so whoever writes a block too early is
    noticed; a job that fails leaves garbage. ``done`` never waits; ``after`` calls back when jobs have
    ended."""

    def __init__(self, node: "Node", blocks: int, block_size: int) -> None:
        self.kv: list[list[KvStamp | None]] = [[None] * block_size for _ in range(blocks)]
        self._node = node
        self._queue: list[SwapJob] = []
        self._ended: list[SwapDone] = []
        self._waiter: tuple[set[int], Callable[[], None]] | None = None

    @property
    def host_blocks(self) -> int:
        return len(self.kv)

    def begin(self, jobs: Sequence[SwapJob]) -> None:
        idle = not self._queue
        self._queue += jobs
        if idle:
            self._next()

    def wait(self, job_ids: Collection[int]) -> None:
        raise AssertionError("in virtual time nobody waits")

    def done(self) -> list[SwapDone]:
        ended, self._ended = self._ended, []
        return ended

    def cost_s(self, blocks: int, runs: int) -> float:
        return COPY_S[1] / 2

    def after(self, job_ids: Collection[int], then: Callable[[], None]) -> None:
        """Call ``then`` once these jobs have ended: now, if they have."""
        self._waiter = (set(job_ids), then)
        self._look()

    def check(self) -> None:
        """Every copy is held by somebody, or kept for whoever comes: none is left of a request that is gone,
        and what is leased belongs to a request whose move is not decided."""
        cache, engine = self._node.engine._switching.host, self._node.engine
        status = {row.request_id: row.status for row in engine.rows("", 0.0)}
        for owner in cache._copies:
            assert owner in status or owner.startswith("kept/"), f"{owner} left its KV on the host"
        for owner in cache._leased:
            assert status[owner] is RequestStatus.MIGRATING, f"{owner} is {status[owner]} and leased"
            assert self._node.agent._outgoing.moving(owner), f"{owner} is leased and not on the move"

    def _next(self) -> None:
        if self._queue:
            world = self._node.world
            world.at(world.now + world.random.uniform(*COPY_S), self._end)

    def _end(self) -> None:
        if not self._node.alive:
            return
        job = self._queue.pop(0)
        failed = self._node.world.random.random() < FAILED_COPIES
        device = self._node.kv
        for ours, theirs in zip(job.device_blocks, job.host_blocks, strict=True):
            if job.direction is SwapDirection.OUT:
                self.kv[theirs] = [None] * len(device[ours]) if failed else list(device[ours])
            else:
                device[ours] = [None] * len(device[ours]) if failed else list(self.kv[theirs])
        self._ended.append(SwapDone(job.job_id, "it was to be" if failed else ""))
        self._next()
        self._look()

    def _look(self) -> None:
        if self._waiter is None:
            return
        job_ids, then = self._waiter
        if not any(job.job_id in job_ids for job in self._queue):
            self._waiter = None
            then()
