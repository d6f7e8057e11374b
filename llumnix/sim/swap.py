"""Swapping in virtual time: what copies over a host link cost, and a copier whose jobs end when that is over.

Both directions of a link work at once. One copy operation of b bytes takes ``copy_s + b / bytes_per_s``; in a
batch the part of it that submitting takes falls away. Everything is decided by the same core and the same
copy ladder as on a real engine; only the bytes are missing. Driven by the simulator and by the fairness
benchmark.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from llumnix.core.config import SwapConfig
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import KvLayout
from llumnix.instance.copy_ladder import (
    ALLOWED_RUNGS,
    CopyCost,
    CopyLadder,
    CopyTotals,
    Rung,
    paired_runs,
)
from llumnix.instance.swap import SwapDirection, SwapDone, SwapJob
from llumnix.instance.swap_order import SwapOrder

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class HostLink:
    """Between a device and its host's memory. ``copy_s`` is what a copy operation takes beside its bytes,
    ``submit_s`` the share of that which the host spends on submitting it. ``gather_s`` is what a staged copy
    takes for its kernel, ``device_bytes_per_s`` how fast that reads and writes."""

    bytes_per_s: float
    copy_s: float
    submit_s: float
    gather_s: float
    device_bytes_per_s: float

    def costs(self) -> dict[Rung, CopyCost]:
        """Of every rung of the ladder."""
        each = CopyCost(0.0, self.copy_s, 1 / self.bytes_per_s)
        return {
            Rung.PIECE: each,
            Rung.BLOCK: each,
            Rung.RUN: each,
            Rung.BATCH: CopyCost(self.submit_s, self.copy_s - self.submit_s, 1 / self.bytes_per_s),
            Rung.STAGING: CopyCost(
                self.copy_s + self.gather_s, 0.0, 1 / self.bytes_per_s + 2 / self.device_bytes_per_s
            ),
        }


PCIE5_BYTES_PER_S = 49e9
SUBMIT_S = 2.3e-6
COPY_S = 64e3 / 4e9 - 64e3 / PCIE5_BYTES_PER_S

# Public measurements on PCIe 5: copies of 64 KB reach 4 GB/s, of 256 KB 13, of 16 MB and more 49; submitting
# one takes 2.3 µs. The first and the last give the cost of a copy, 14.7 µs, and that gives 12.8 GB/s for
# the second. PCIe 4 has half the bandwidth. A kernel launch takes about 10 µs; an A10's memory does 600 GB/s.
# In the light variant a copy costs its submission only, in favour of those who make many.
HOST_LINKS = {
    "pcie4": HostLink(PCIE5_BYTES_PER_S / 2, COPY_S, SUBMIT_S, 10e-6, 600e9),
    "pcie4-light": HostLink(PCIE5_BYTES_PER_S / 2, SUBMIT_S, SUBMIT_S, 10e-6, 600e9),
    "pcie5": HostLink(PCIE5_BYTES_PER_S, COPY_S, SUBMIT_S, 10e-6, 600e9),
}


def host_link(cost_model: str) -> HostLink:
    """That of the device in a cost model's name; PCIe 4 for one that is not known."""
    return HOST_LINKS["pcie5" if cost_model.partition("@")[2].startswith("h") else "pcie4"]


class VirtualCopier:
    """A Copier for the host memory that ``config`` says. ``now`` tells the time; ``wait`` lets it pass, by
    calling ``sleep_until``. An event-driven simulator asks ``ready_at`` instead and never waits."""

    def __init__(
        self,
        link: HostLink,
        layout: KvLayout,
        config: SwapConfig,
        *,
        now: Callable[[], float],
        sleep_until: Callable[[float], None] | None = None,
    ) -> None:
        costs = link.costs()
        self._totals = {direction: CopyTotals() for direction in SwapDirection}
        self._ladder = CopyLadder(
            costs, ALLOWED_RUNGS[config.swap_copies], layout.block_bytes, planes=2 * layout.layers
        )
        self._host_blocks = config.host_blocks or int(config.host_gib * GIB) // layout.block_bytes
        self._now, self._sleep_until = now, sleep_until
        self._order = SwapOrder()
        self._ends: dict[int, float] = {}
        self._lane_free = dict.fromkeys(SwapDirection, 0.0)
        self._due: list[tuple[float, int]] = []

    @property
    def host_blocks(self) -> int:
        return self._host_blocks

    def begin(self, jobs: Sequence[SwapJob]) -> None:
        for job in jobs:
            before = self._order.begin(job)
            runs = len(paired_runs(job.device_blocks, job.host_blocks))
            blocks = len(job.device_blocks)
            cost_s = self._ladder.cost_s(blocks, runs)
            starts = [self._ends[other] for other in before]
            start = max([self._now(), self._lane_free[job.direction], *starts])
            self._ends[job.job_id] = self._lane_free[job.direction] = start + cost_s
            heappush(self._due, (start + cost_s, job.job_id))
            totals = self._totals[job.direction]
            totals.jobs += 1
            totals.blocks += blocks
            totals.copies += self._ladder.copies(self._ladder.choose(blocks, runs), blocks, runs)
            totals.busy_s += cost_s

    def wait(self, job_ids: Collection[int]) -> None:
        if self._sleep_until is None:
            raise InvariantError("an event-driven simulator does not wait")
        self._sleep_until(self.ready_at(job_ids))

    def ready_at(self, job_ids: Collection[int]) -> float:
        """When the last of these will have ended; now, if all have."""
        ends = (self._ends[job_id] for job_id in job_ids if job_id in self._ends)
        return max([self._now(), *ends])

    def done(self) -> list[SwapDone]:
        ended: list[SwapDone] = []
        while self._due and self._due[0][0] <= self._now():
            _, job_id = heappop(self._due)
            self._order.end(job_id)
            del self._ends[job_id]
            ended.append(SwapDone(job_id))
        return ended

    def totals(self) -> dict[SwapDirection, CopyTotals]:
        """What was begun so far, by direction."""
        return {direction: replace(totals) for direction, totals in self._totals.items()}

    def cost_s(self, blocks: int, runs: int) -> float:
        return self._ladder.cost_s(blocks, runs)
