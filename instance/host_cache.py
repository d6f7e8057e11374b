"""The KV that an instance keeps in host memory: copies of requests swapped out or running, and of
conversations that may go on.

A copy holds the KV of the first ``valid_tokens`` tokens of something: of a request while it lives, then,
kept, of whoever begins with the same tokens. KV is only appended to, so a copy stays true after its request
has gone on; the next swap-out adds what is new. Lookup is by hash chained over full blocks, and tokens are
compared before a hit counts. Space behind a copy is its to grow into (block groups, as on the device).

Space for one copy is made by dropping others: kept copies and those of running requests first, lower
execution priority first, then the one used least lately. A copy that a swapped-out request needs gives way to
higher priority only. What is dropped is gone at once, index entries included, and who needed it is
plainly waiting again, at another ``kv_version``, so that a migration that was reading it notices. While a
request's move elsewhere is being decided its copy is *leased*: it cannot be dropped, since the peer may be
reading the last of it. Whatever is here may still be
on its way: copies of one block are made in the order begun (swap.py). Called by switching.py only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import RequestStatus
from llumnix.instance.block_manager import BlockManager
from llumnix.instance.request import Request


@dataclass(slots=True, eq=False)
class HostCopy:
    """One copy. ``needed``: its request is swapped out and has its KV nowhere else. ``failed``: a copy job
    went wrong, the bytes are garbage. ``hashes`` of its first full blocks are in the index."""

    owner: str
    tokens: Sequence[int]
    priority: int
    valid_tokens: int = 0
    request: Request | None = None
    needed: bool = False
    failed: bool = False
    hashes: list[int] = field(default_factory=list)


def chain_hashes(tokens: Sequence[int], block_size: int, blocks: int, known: Sequence[int] = ()) -> list[int]:
    """The hashes of the first ``blocks`` full blocks, each over its tokens and the hash before it; ``known``
    are the first of them. Only tells where to look: hits are compared token by token."""
    hashes = list(known[:blocks])
    last = hashes[-1] if hashes else 0
    for index in range(len(hashes), blocks):
        last = hash((last, tuple(tokens[index * block_size : (index + 1) * block_size])))
        hashes.append(last)
    return hashes


class HostCache:
    """See the module. ``dropped`` counts copies that gave way, ``dropped_needed`` those that cost a
    swapped-out request its KV. ``versions`` are the engine's, for requests whose KV is lost here."""

    def __init__(self, capacity: int, block_size: int, versions: Iterator[int], *, grouped: bool) -> None:
        self.blocks = BlockManager(capacity, grouped=grouped)
        self.dropped = 0
        self.dropped_needed = 0
        self._block_size = block_size
        self._versions = versions
        self._copies: dict[str, HostCopy] = {}  # used least lately first
        self._index: dict[int, HostCopy] = {}
        self._leased: dict[str, HostCopy] = {}
        self._kept = 0

    def find(self, request_id: str) -> HostCopy | None:
        """The copy of a live request."""
        return self._copies.get(request_id)

    def table(self, copy: HostCopy) -> list[int]:
        """The host blocks of a copy, in order of position."""
        return self.blocks.table(copy.owner)

    def room_for(self, request: Request, tokens: int, *, needed: bool) -> HostCopy | None:
        """The request's copy with room for the KV of its first ``tokens`` tokens; None: the host is full."""
        copy = self._copies.pop(request.request_id, None)
        if copy is None:
            copy = HostCopy(request.request_id, request.tokens, request.execution_priority, request=request)
        held = len(self.table(copy)) if self.blocks.holds(copy.owner) else 0
        missing = -(-tokens // self._block_size) - held
        if missing > self.blocks.free_blocks and not self._make_room(missing, copy.priority, needed):
            if held:
                self._copies[copy.owner] = copy
            return None
        self._copies[copy.owner] = copy
        if missing > 0:
            whole = -(-(request.prompt_len + request.sampling.max_tokens) // self._block_size)
            self.blocks.grow(copy.owner, missing, max(0, whole - held - missing))
        return copy

    def publish(self, copy: HostCopy) -> None:
        """Let others find the full blocks of a copy that are valid by now."""
        known = len(copy.hashes)
        full = copy.valid_tokens // self._block_size
        copy.hashes = chain_hashes(copy.tokens, self._block_size, full, copy.hashes)
        for key in copy.hashes[known:]:
            self._index.setdefault(key, copy)

    def keep(self, copy: HostCopy) -> None:
        """Its request is gone: keep the full blocks for those that begin with the same tokens."""
        full = copy.valid_tokens // self._block_size
        if full == 0:
            self.drop(copy)
            return
        self._kept += 1
        del self._copies[copy.owner]
        kept = f"kept/{self._kept}"
        self.blocks.trim(copy.owner, full)
        self.blocks.hand_over(copy.owner, kept)
        copy.owner, copy.request, copy.needed = kept, None, False
        copy.valid_tokens = full * self._block_size
        copy.tokens = copy.tokens[: copy.valid_tokens]
        self._copies[kept] = copy
        self.publish(copy)

    def match(self, hashes: Sequence[int], tokens: Sequence[int]) -> tuple[HostCopy, int] | None:
        """The copy that begins with most of the full blocks of ``tokens``, whose chained hashes are given,
        and with how many; None: no copy does."""
        for blocks in range(len(hashes), 0, -1):
            copy = self._index.get(hashes[blocks - 1])
            if copy is not None:
                end = blocks * self._block_size
                if copy.tokens[:end] == tokens[:end]:
                    return copy, blocks
        return None

    def inherit(self, copy: HostCopy, request: Request, blocks: int) -> bool:
        """Make a kept copy the request's own, cut to the blocks they share, if that is most of it. False: it
        stays as it is, to be read."""
        if copy.request is not None or 2 * blocks < len(self.table(copy)):
            return False
        del self._copies[copy.owner]
        self._unpublish(copy, blocks)
        self.blocks.trim(copy.owner, blocks)
        self.blocks.hand_over(copy.owner, request.request_id)
        copy.owner, copy.request, copy.tokens = request.request_id, request, request.tokens
        copy.priority, copy.valid_tokens = request.execution_priority, blocks * self._block_size
        self._copies[copy.owner] = copy
        return True

    def usable_tokens(self, copy: HostCopy, request: Request) -> int:
        """Of how many of its tokens a request without device blocks has the KV in its copy, the last known
        one left to compute."""
        return min(copy.valid_tokens, len(request.tokens) - 1)

    def lease(self, request: Request) -> None:
        """Keep a request's copy, if there is one, whatever comes, until ``end_lease`` or the request is
        gone."""
        copy = self.find(request.request_id)
        if copy is not None:
            self._leased[copy.owner] = copy

    def end_lease(self, request: Request) -> None:
        """The request is back in the queue. A copy that has failed meanwhile is dropped."""
        copy = self._leased.pop(request.request_id, None)
        if copy is not None and copy.failed:
            self.drop(copy)

    @property
    def leased_blocks(self) -> int:
        """Blocks of leased copies."""
        return sum(len(self.table(copy)) for copy in self._leased.values())

    def leased(self, copy: HostCopy) -> bool:
        """Whether a copy cannot be dropped now."""
        return copy.owner in self._leased

    def touch(self, copy: HostCopy) -> None:
        """It was used just now."""
        self._copies[copy.owner] = self._copies.pop(copy.owner)

    def drop(self, copy: HostCopy) -> None:
        """Forget a copy; one that is gone already is fine."""
        if self._copies.get(copy.owner) is copy:
            del self._copies[copy.owner]
            self._leased.pop(copy.owner, None)
            self._unpublish(copy, 0)
            self.blocks.free(copy.owner)
            request = copy.request
            if request is not None and not request.blocks:
                request.kv_version = next(self._versions)
                if request.status is RequestStatus.SWAPPED:
                    request.status = RequestStatus.WAITING
            copy.valid_tokens, copy.needed = 0, False

    def check(self) -> None:
        """Raise InvariantError unless copies, blocks and index agree."""
        self.blocks.check()
        if sum(len(self.table(copy)) for copy in self._copies.values()) != self.blocks.owned_blocks:
            raise InvariantError("host blocks are owned by copies that are not held")
        for copy in self._leased.values():
            request = copy.request
            taken_out = request is not None and request.status is RequestStatus.MIGRATING
            if not taken_out or self._copies.get(copy.owner) is not copy:
                raise InvariantError(f"host copy {copy.owner} is leased to no migration")
        for copy in self._copies.values():
            if copy.valid_tokens > len(self.table(copy)) * self._block_size:
                raise InvariantError(f"host copy {copy.owner} is longer than its blocks")
        if not all(self._copies.get(copy.owner) is copy for copy in self._index.values()):
            raise InvariantError("the index leads to a host copy that is gone")

    def _make_room(self, blocks: int, priority: int, needed: bool) -> bool:
        """Drop copies until so many blocks are free; none if that cannot be reached."""
        missing = blocks - self.blocks.free_blocks
        victims: list[HostCopy] = []
        candidates = (copy for copy in self._copies.values() if not self.leased(copy))
        for copy in sorted(candidates, key=lambda copy: (copy.needed, copy.priority)):
            if missing <= 0:
                break
            gives_way = needed or copy.priority <= priority
            if copy.needed:
                gives_way = needed and copy.priority < priority
            if gives_way:
                victims.append(copy)
                missing -= len(self.table(copy))
        if missing > 0:
            return False
        for copy in victims:
            self.dropped += 1
            self.dropped_needed += copy.needed
            self.drop(copy)
        return True

    def _unpublish(self, copy: HostCopy, keep: int) -> None:
        for key in copy.hashes[keep:]:
            if self._index.get(key) is copy:
                del self._index[key]
        del copy.hashes[keep:]
