"""Swapping in virtual time: what copies over a host link cost, and a copier whose jobs end when that is over.

Both directions of a link work at once. One copy operation of b bytes takes ``copy_s + b / bytes_per_s``, one
of a batch ``batch_copy_s + b / bytes_per_s``. Everything is decided by the same core and the same copy ladder
as on a real engine; only the bytes are missing. Driven by the simulator and by the fairness benchmark.
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
    ``batch_copy_s`` what one of a batch does, ``submit_s`` what handing over a batch does. ``gather_s`` is
    what a staged copy takes for its kernel, ``device_bytes_per_s`` how fast that reads and writes."""

    bytes_per_s: float
    copy_s: float
    batch_copy_s: float
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
            Rung.BATCH: CopyCost(self.submit_s, self.batch_copy_s, 1 / self.bytes_per_s),
            Rung.STAGING: CopyCost(
                self.copy_s + self.gather_s, 0.0, 1 / self.bytes_per_s + 2 / self.device_bytes_per_s
            ),
        }


PCIE5_BYTES_PER_S = 49e9
SUBMIT_S = 2.3e-6
COPY_S = 64e3 / 4e9 - 64e3 / PCIE5_BYTES_PER_S
BATCH_COPY_S = 65536 / 38.8e9 - 65536 / 51.8e9

# Public measurements on PCIe 5. Copy by copy: of 64 KB each they reach 4 GB/s, of 256 KB 13, of 16 MB and
# more 49; the first and the last give the cost of a copy, 14.7 µs, and that gives 12.8 GB/s for the second.
# But submitting one takes 2.3 µs (FlexKV, pull request 193, on H20; DualPath, arXiv 2602.21548, says 5 to 7):
# in the light variant a copy costs no more than that, in favour of those who make many. In a batch of 10,000,
# host to device on H100: of 64 KiB each 38.8 GB/s where 51.8 is the most (vLLM, pull request 42212), 0.4 µs
# a copy, and about as much for 28 KiB; smaller ones collapse to 4 to 7 GB/s, but none here is. PCIe 4 has
# half the bandwidth. A kernel launch takes about 10 µs; an A10's memory does 600 GB/s.
HOST_LINKS = {
    "pcie4": HostLink(PCIE5_BYTES_PER_S / 2, COPY_S, BATCH_COPY_S, SUBMIT_S, 10e-6, 600e9),
    "pcie4-light": HostLink(PCIE5_BYTES_PER_S / 2, SUBMIT_S, BATCH_COPY_S, SUBMIT_S, 10e-6, 600e9),
    "pcie5": HostLink(PCIE5_BYTES_PER_S, COPY_S, BATCH_COPY_S, SUBMIT_S, 10e-6, 600e9),
}


def host_link(cost_model: str) -> HostLink:
    """That of the device in a cost model's name; PCIe 4 for one that is not known."""
    return HOST_LINKS["pcie5" if cost_model.partition("@")[2].startswith("h") else "pcie4"]


class LayerFirstLadder(CopyLadder):
    """For pools with a tensor per layer for keys and one for values, as most engines have them: a run is a
    copy in each."""

    def copies(self, rung: Rung, blocks: int, runs: int) -> int:
        """See CopyLadder."""
        planes = self.planes if rung in (Rung.RUN, Rung.BATCH) else 1
        return planes * super().copies(rung, blocks, runs)


class VirtualCopier:
    """A Copier for the host memory that ``config`` says. ``now`` tells the time; ``wait`` lets it pass, by
    calling ``sleep_until``. An event-driven simulator asks ``ready_at`` instead and never waits.
    ``ladder_type``: how blocks lie in both pools."""

    def __init__(
        self,
        link: HostLink,
        layout: KvLayout,
        config: SwapConfig,
        *,
        now: Callable[[], float],
        sleep_until: Callable[[float], None] | None = None,
        ladder_type: type[CopyLadder] = CopyLadder,
    ) -> None:
        costs = link.costs()
        self._totals = {direction: CopyTotals() for direction in SwapDirection}
        self._ladder = ladder_type(
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
