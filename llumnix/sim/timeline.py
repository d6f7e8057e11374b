"""The cluster over time, from load reports: load per instance, waiting requests, fragmentation.

Fragmented memory, as in the paper: the demands of blocked heads of queues that all free memory of the cluster
together would satisfy (smallest first), as a share of the cluster's memory. With perfect packing none of them
would wait. Samples are bounded: when there are too many, every other one goes and the interval doubles. What
comes after the last request is over, when the cluster only settles, counts for nothing.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from llumnix.core.messages.load import LoadReport
from llumnix.sim.clock import Clock

SAMPLES_MAX = 2048
INSTANCES_DRAWN_MAX = 64
COLUMNS = ("at_s", "instances", "running", "waiting", "used", "fragmented", "migrations")


@dataclass(slots=True)
class Timeline:
    """``columns`` as named; ``used`` and ``fragmented`` as shares. ``loads``: used share of each instance,
    for clusters of at most INSTANCES_DRAWN_MAX."""

    clock: Clock
    interval_s: float = 1.0
    migrations: int = 0
    columns: dict[str, "array[float]"] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    loads: dict[str, "array[float]"] = field(default_factory=dict)
    _reports: dict[str, LoadReport] = field(default_factory=dict)
    _busy_s: float = 0.0
    _since: dict[str, float] = field(default_factory=dict)
    _ended_at: float = inf

    def start(self) -> None:
        """Sample from now on."""
        self.clock.at(self.clock.now + self.interval_s, self._sample)

    def end(self) -> None:
        """The last request is over."""
        self._ended_at = self.clock.now

    def report(self, report: LoadReport) -> None:
        """An instance has said how it is. Word that comes after its end is not heard."""
        if report.instance_id in self._since:
            self._reports[report.instance_id] = report

    def instance_up(self, instance_id: str) -> None:
        """It costs money from now on, if it does not already."""
        self._since.setdefault(instance_id, self.clock.now)

    def instance_down(self, instance_id: str) -> None:
        """It has ended."""
        self._busy_s += max(0.0, min(self.clock.now, self._ended_at) - self._since.pop(instance_id))
        self._reports.pop(instance_id, None)

    def instance_s(self, until: float) -> float:
        """Seconds that instances have lived, together."""
        return self._busy_s + sum(max(0.0, until - since) for since in self._since.values())

    def mean(self, name: str) -> float:
        """Of a column; 0 without samples."""
        column = self.columns[name]
        return sum(column) / len(column) if column else 0.0

    def _sample(self, _: object) -> None:
        if self.clock.now > self._ended_at:
            return
        reports = self._reports
        capacity = sum(report.capacity_blocks for report in reports.values())
        used = sum(report.used_blocks + report.reserved_blocks for report in reports.values())
        row = (
            self.clock.now,
            len(self._since),
            sum(report.running for report in reports.values()),
            sum(report.waiting for report in reports.values()),
            used / capacity if capacity else 0.0,
            fragmented_blocks(reports.values()) / capacity if capacity else 0.0,
            self.migrations,
        )
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        if len(self._since) <= INSTANCES_DRAWN_MAX:
            self._sample_loads(len(self.columns["at_s"]))
        if len(self.columns["at_s"]) >= SAMPLES_MAX:
            self._thin()
        self.clock.at(self.clock.now + self.interval_s, self._sample)

    def _sample_loads(self, samples: int) -> None:
        for instance_id, report in self._reports.items():
            loads = self.loads.setdefault(instance_id, array("d"))
            loads.extend([float("nan")] * (samples - 1 - len(loads)))
            loads.append((report.used_blocks + report.reserved_blocks) / report.capacity_blocks)

    def _thin(self) -> None:
        self.interval_s *= 2
        for columns in (self.columns, self.loads):
            for name, column in columns.items():
                columns[name] = column[1::2]


def fragmented_blocks(reports: Iterable[LoadReport]) -> int:
    """Blocks wanted by blocked heads of queues that the cluster's free blocks could hold together. A head
    that lacks no block waits for a step to end or a place in the batch, not for memory."""
    free, heads = 0, []
    for report in reports:
        free += report.capacity_blocks - report.used_blocks - report.reserved_blocks
        if report.head_missing_blocks:
            heads.append(report.head_blocks)
    total = 0
    for blocks in sorted(heads):
        if total + blocks > free:
            break
        total += blocks
    return total
