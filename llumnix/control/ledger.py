"""What the manager has decided and no report shows yet. Without it fifty requests placed between two reports
would all go to the instance that looked freest in the last one.

Both ledgers are bounded: entries end when a report or a message confirms them, or by age, or, at the stated
maximum, oldest first. Nothing here needs to outlive the manager. Called by the cluster view only, which keeps
the sums per instance.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from llumnix.core.errors import InvariantError

PLACEMENTS_MAX = 100_000
MOVES_MAX = 10_000


class Placement(NamedTuple):
    """A request sent to an instance that has not said yet that it took it."""

    request_id: str
    instance_id: str
    blocks: int
    placed_at: float
    adapter: str = ""


class PlacementLedger:
    """Unconfirmed placements, oldest first."""

    def __init__(self) -> None:
        self._entries: dict[str, Placement] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, placement: Placement) -> Placement | None:
        """Enter one; returns what it displaced: an older one of the same request, or the oldest of all."""
        displaced = self._entries.pop(placement.request_id, None)
        self._entries[placement.request_id] = placement
        if displaced is None and len(self._entries) > PLACEMENTS_MAX:
            displaced = self._entries.pop(next(iter(self._entries)))
        return displaced

    def confirm(self, request_id: str, instance_id: str) -> Placement | None:
        """The instance has the request: remove and return the entry, if it is about this instance."""
        entry = self._entries.get(request_id)
        if entry is None or entry.instance_id != instance_id:
            return None
        return self._entries.pop(request_id)

    def expire(self, placed_before: float) -> list[Placement]:
        """Remove and return all entries older than that."""
        gone: list[Placement] = []
        for entry in self._entries.values():
            if entry.placed_at >= placed_before:
                break
            gone.append(entry)
        for entry in gone:
            del self._entries[entry.request_id]
        return gone

    def drop_instance(self, instance_id: str) -> None:
        """The instance has ended, and with it all that was on its way there."""
        for entry in [entry for entry in self._entries.values() if entry.instance_id == instance_id]:
            del self._entries[entry.request_id]


@dataclass(slots=True, eq=False)
class MoveEntry:
    """An ordered migration. One that changed hands lingers, for each side that has not reported since,
    because that side's last report still shows the request where it was. ``pending`` are those sides."""

    migration_id: str
    request_id: str
    source_id: str
    target_id: str
    blocks: int
    ordered_at: float
    ended_at: float = 0.0
    pending: tuple[str, ...] = ()


class MoveLedger:
    """Ordered migrations: the running ones by id and by request, and those that linger."""

    def __init__(self) -> None:
        self._running: dict[str, MoveEntry] = {}
        self._moving: dict[str, MoveEntry] = {}
        self._lingering: list[MoveEntry] = []
        self._out: Counter[str] = Counter()
        self._in: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._running) + len(self._lingering)

    @property
    def running(self) -> tuple[MoveEntry, ...]:
        """Those that have not ended, oldest first."""
        return tuple(self._running.values())

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def moving_requests(self) -> tuple[str, ...]:
        """Requests with a running migration."""
        return tuple(self._moving)

    def is_moving(self, request_id: str) -> bool:
        """Whether the request has a running migration."""
        return request_id in self._moving

    def running_out(self, instance_id: str) -> int:
        """Running migrations that an instance is the source of."""
        return self._out[instance_id]

    def running_in(self, instance_id: str) -> int:
        """Running migrations that an instance is the target of."""
        return self._in[instance_id]

    def add(self, entry: MoveEntry) -> None:
        """Enter one that has just been ordered. Its request has no other, and there is room (MOVES_MAX)."""
        if entry.request_id in self._moving or len(self._running) >= MOVES_MAX:
            raise InvariantError(
                f"migration {entry.migration_id} ordered beside another of its request or past the bound"
            )
        entry.pending = (entry.source_id, entry.target_id)
        self._running[entry.migration_id] = self._moving[entry.request_id] = entry
        self._out[entry.source_id] += 1
        self._in[entry.target_id] += 1

    def end(self, migration_id: str, now: float, *, linger: bool) -> MoveEntry | None:
        """It has ended; ``linger`` if the request changed hands. None: not running, so ended before or not
        ours."""
        entry = self._running.pop(migration_id, None)
        if entry is None:
            return None
        del self._moving[entry.request_id]
        for counts, instance_id in ((self._out, entry.source_id), (self._in, entry.target_id)):
            counts[instance_id] -= 1
            if not counts[instance_id]:
                del counts[instance_id]
        entry.ended_at = now
        if linger:
            self._lingering.append(entry)
        return entry

    def settle(self, instance_id: str) -> list[MoveEntry]:
        """The instance has reported: the lingering entries that waited for it, which no longer do."""
        if not self._lingering:
            return []
        settled = [entry for entry in self._lingering if instance_id in entry.pending]
        for entry in settled:
            entry.pending = tuple(side for side in entry.pending if side != instance_id)
        self._lingering = [entry for entry in self._lingering if entry.pending]
        return settled

    def expire(self, ended_before: float) -> list[MoveEntry]:
        """Remove and return what has lingered since before that."""
        gone = [entry for entry in self._lingering if entry.ended_at < ended_before]
        if gone:
            self._lingering = [entry for entry in self._lingering if entry.ended_at >= ended_before]
        return gone

    def detach(self, instance_id: str) -> None:
        """The instance's process has ended: no report of it will settle anything."""
        for entry in self._running.values():
            entry.pending = tuple(side for side in entry.pending if side != instance_id)
        self.settle(instance_id)
