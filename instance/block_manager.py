"""Who holds each KV block of one instance: nobody (free), a request (owned) or an incoming migration
(reserved).

Every block is exactly one of the three at any moment; ``check`` proves it. Requests are refused blocks only
when too few are free, wherever those lie. Called by the local scheduler and the engine core, which see to it
that one id names one holder. Block groups would go where ``grow`` takes blocks: nothing else decides where
blocks lie.
"""

from llumnix.core.errors import InvariantError
from llumnix.instance.free_runs import FreeRuns, runs_of


class BlockManager:
    """The block tables of a pool of ``capacity`` blocks."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.owned_blocks = 0
        self.reserved_blocks = 0
        self._free = FreeRuns(capacity)
        self._owned: dict[str, list[int]] = {}
        self._reserved: dict[str, list[int]] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks nobody holds."""
        return self._free.total

    @property
    def reservations(self) -> int:
        """Reservations that hold at least one block."""
        return len(self._reserved)

    def table(self, request_id: str) -> list[int]:
        """The blocks of a request in order of position: the live list, which grows and shrinks with it."""
        return self._owned[request_id]

    def grow(self, request_id: str, count: int) -> bool:
        """Give a request ``count`` more blocks, all or none. False: too few are free."""
        if count > self._free.total:
            return False
        blocks = self._owned.setdefault(request_id, [])
        blocks.extend(self._free.take(count, blocks[-1] if blocks else None))
        self.owned_blocks += count
        return True

    def trim(self, request_id: str, keep: int) -> None:
        """Free all but the first ``keep`` blocks of a request."""
        blocks = self._owned[request_id]
        surplus = blocks[keep:]
        del blocks[keep:]
        self.owned_blocks -= len(surplus)
        self._put(surplus)

    def free(self, request_id: str) -> None:
        """Free all blocks of a request; one without blocks is fine."""
        blocks = self._owned.pop(request_id, [])
        self.owned_blocks -= len(blocks)
        self._put(blocks)

    def reserved(self, migration_id: str) -> int:
        """How many blocks a reservation holds; 0 for an unknown one."""
        return len(self._reserved.get(migration_id, ()))

    def reserve(self, migration_id: str, total: int) -> tuple[int, ...] | None:
        """Make a reservation hold at least ``total`` blocks and return them in order; None: too few are
        free."""
        held = self._reserved.get(migration_id, [])
        missing = max(0, total - len(held))
        if missing > self._free.total:
            return None
        if missing:
            held.extend(self._free.take(missing, held[-1] if held else None))
            self._reserved[migration_id] = held
            self.reserved_blocks += missing
        return tuple(held)

    def cancel(self, migration_id: str) -> None:
        """Free a reservation; an unknown one is fine."""
        blocks = self._reserved.pop(migration_id, [])
        self.reserved_blocks -= len(blocks)
        self._put(blocks)

    def adopt(self, migration_id: str, request_id: str) -> None:
        """Turn a reservation's blocks into a request's. The request must not hold any yet."""
        if request_id in self._owned:
            raise InvariantError(
                f"{request_id} already holds blocks and cannot adopt those of {migration_id}"
            )
        blocks = self._reserved.pop(migration_id)
        self._owned[request_id] = blocks
        self.reserved_blocks -= len(blocks)
        self.owned_blocks += len(blocks)

    def free_runs(self) -> list[tuple[int, int]]:
        """The free runs as (start, length), by start."""
        return self._free.runs()

    def check(self) -> None:
        """Raise InvariantError unless free, owned and reserved blocks are all blocks, each once.
        O(capacity)."""
        self._free.check()
        holders = [block for start, length in self._free.runs() for block in range(start, start + length)]
        owned = [block for blocks in self._owned.values() for block in blocks]
        reserved = [block for blocks in self._reserved.values() for block in blocks]
        if len(owned) != self.owned_blocks or len(reserved) != self.reserved_blocks:
            raise InvariantError("the counts of owned or reserved blocks are off")
        if sorted(holders + owned + reserved) != list(range(self.capacity)):
            raise InvariantError("a block is lost or held twice")

    def _put(self, blocks: list[int]) -> None:
        for start, length in runs_of(blocks):
            self._free.put(start, length)
