"""Who holds each KV block of one pool: nobody (free), a request (owned) or an incoming migration (reserved).

Every block is exactly one of the three at any moment; ``check`` proves it. Requests are refused blocks only
when too few are free, wherever those lie. A copy between device and host memory may still use a block that
has been given back: such a block is free, but goes out last, never to a reservation, and whoever gets it has
to wait for the copy (``conflicts``). The host's pool is kept the same way, by owners of host copies.

Called by the local scheduler, the engine core and the host cache, which see to it that one id names one
holder. Where blocks lie is for block_groups.py to decide.
"""

from collections.abc import Iterable

from llumnix.core.errors import InvariantError
from llumnix.instance.block_groups import BlockPool, GroupedBlocks, Holding, ScatteredBlocks

ANY_GROWTH = 1 << 30


class BlockManager:
    """The block tables of a pool of ``capacity`` blocks, ``grouped`` or as a plain free list."""

    def __init__(self, capacity: int, *, grouped: bool = True) -> None:
        self.capacity = capacity
        self.owned_blocks = 0
        self.reserved_blocks = 0
        self.conflicts: set[int] = set()
        self._pool: BlockPool = GroupedBlocks(capacity) if grouped else ScatteredBlocks(capacity)
        self._owned: dict[str, Holding] = {}
        self._reserved: dict[str, Holding] = {}
        self._in_use: dict[int, int] = {}
        self._leaving: dict[int, None] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks nobody holds."""
        return self._pool.total + len(self._leaving)

    @property
    def idle_blocks(self) -> int:
        """Free blocks that no copy uses."""
        return self._pool.total

    @property
    def reservations(self) -> int:
        """Reservations that hold at least one block."""
        return len(self._reserved)

    def holds(self, request_id: str) -> bool:
        """Whether a request owns blocks."""
        return request_id in self._owned

    def table(self, request_id: str) -> list[int]:
        """The blocks of a request in order of position: the live list, which grows and shrinks with it."""
        return self._owned[request_id].blocks

    def grow(self, request_id: str, count: int, expected: int = ANY_GROWTH, keep_idle: int = 0) -> bool:
        """Give a request ``count`` more blocks, all or none, and as good as possible a place to grow by
        ``expected`` more. False: too few are free. Blocks that a copy still uses go out when there are no
        others but ``keep_idle``, and that copy is then in ``conflicts``."""
        holding = self._owned.get(request_id)
        if holding is not None and not keep_idle and count <= holding.tail_length:
            self._pool.take(holding, count, 0)
            self.owned_blocks += count
            return True
        if count > self.free_blocks:
            return False
        if holding is None:
            holding = self._owned[request_id] = Holding()
        busy = min(len(self._leaving), max(0, count - max(0, self._pool.total - keep_idle)))
        if busy:
            self._take_leaving(holding, busy)
        self._pool.take(holding, count - busy, self._tail(expected))
        self.owned_blocks += count
        return True

    def grow_in_place(self, counts: list[tuple[str, int]]) -> bool:
        """Give each of these owners so many more blocks, from its own tail. False: a tail is too short, and
        nothing has changed."""
        owned, take = self._owned, self._pool.take
        for request_id, count in counts:
            if count > owned[request_id].tail_length:
                return False
        for request_id, count in counts:
            take(owned[request_id], count, 0)
            self.owned_blocks += count
        return True

    def trim(self, request_id: str, keep: int) -> None:
        """Free all but the first ``keep`` blocks of a request."""
        holding = self._owned[request_id]
        surplus = holding.blocks[keep:]
        if surplus:
            self._pool.shed(holding)
            del holding.blocks[keep:]
            self.owned_blocks -= len(surplus)
            self._put(surplus)

    def free(self, request_id: str) -> None:
        """Free all blocks of a request; one without blocks is fine."""
        holding = self._owned.pop(request_id, None)
        if holding is not None:
            self.owned_blocks -= len(holding.blocks)
            self._release(holding)

    def hand_over(self, request_id: str, heir_id: str) -> None:
        """Let another request, which must not hold any blocks yet, own those of this one."""
        if heir_id in self._owned:
            raise InvariantError(f"{heir_id} already holds blocks and cannot inherit those of {request_id}")
        self._owned[heir_id] = self._owned.pop(request_id)

    def reserved(self, migration_id: str) -> int:
        """How many blocks a reservation holds; 0 for an unknown one."""
        holding = self._reserved.get(migration_id)
        return 0 if holding is None else len(holding.blocks)

    def reserve(self, migration_id: str, total: int, expected: int = ANY_GROWTH) -> tuple[int, ...] | None:
        """Make a reservation hold at least ``total`` blocks, likely ``expected`` more, and return them in
        order; None: too few are free and used by no copy."""
        holding = self._reserved.get(migration_id) or Holding()
        missing = max(0, total - len(holding.blocks))
        if missing > self._pool.total:
            return None
        if missing:
            self._pool.take(holding, missing, self._tail(expected))
            self._reserved[migration_id] = holding
            self.reserved_blocks += missing
        return tuple(holding.blocks)

    def cancel(self, migration_id: str) -> None:
        """Free a reservation; an unknown one is fine."""
        holding = self._reserved.pop(migration_id, None)
        if holding is not None:
            self.reserved_blocks -= len(holding.blocks)
            self._release(holding)

    def adopt(self, migration_id: str, request_id: str) -> None:
        """Turn a reservation's blocks into a request's. The request must not hold any yet."""
        if request_id in self._owned:
            raise InvariantError(
                f"{request_id} already holds blocks and cannot adopt those of {migration_id}"
            )
        holding = self._reserved.pop(migration_id)
        self._owned[request_id] = holding
        self.reserved_blocks -= len(holding.blocks)
        self.owned_blocks += len(holding.blocks)

    def copy_begins(self, job_id: int, blocks: Iterable[int]) -> None:
        """A copy reads or writes these blocks until ``copy_ends``. A later copy of a block waits for the
        earlier, so that only the last counts."""
        self._in_use.update(dict.fromkeys(blocks, job_id))

    def copy_ends(self, job_id: int, blocks: Iterable[int]) -> None:
        """A copy has ended."""
        done = []
        for block in blocks:
            if self._in_use.get(block) == job_id:
                del self._in_use[block]
                if block in self._leaving:
                    del self._leaving[block]
                    done.append(block)
        self._pool.give(done)

    def free_runs(self) -> list[tuple[int, int]]:
        """The free runs that no copy uses as (start, length), by start."""
        return self._pool.runs()

    def check(self) -> None:
        """Raise InvariantError unless free, owned and reserved blocks are all blocks, each once.
        O(capacity)."""
        self._pool.check()
        free = [block for start, length in self._pool.runs() for block in range(start, start + length)]
        owned = [block for holding in self._owned.values() for block in holding.blocks]
        reserved = [block for holding in self._reserved.values() for block in holding.blocks]
        if len(free) != self._pool.total:
            raise InvariantError("the count of free blocks is off")
        if len(owned) != self.owned_blocks or len(reserved) != self.reserved_blocks:
            raise InvariantError("the counts of owned or reserved blocks are off")
        if sorted([*free, *self._leaving, *owned, *reserved]) != list(range(self.capacity)):
            raise InvariantError("a block is lost or held twice")
        if not self._leaving.keys() <= self._in_use.keys():
            raise InvariantError("a free block waits for no copy")

    def _tail(self, expected: int) -> int:
        """How long a new group's tail may be: what its holder is likely to need, and at most its fair share
        of the free blocks."""
        return min(expected, self._pool.total // (len(self._owned) + len(self._reserved) + 1))

    def _take_leaving(self, holding: Holding, count: int) -> None:
        self._pool.shed(holding)
        for block in list(self._leaving)[:count]:
            del self._leaving[block]
            self.conflicts.add(self._in_use[block])
            holding.blocks.append(block)

    def _release(self, holding: Holding) -> None:
        self._pool.shed(holding)
        self._put(holding.blocks)

    def _put(self, blocks: list[int]) -> None:
        if self._in_use:
            self._leaving.update((block, None) for block in blocks if block in self._in_use)
            blocks = [block for block in blocks if block not in self._in_use]
        self._pool.give(blocks)
