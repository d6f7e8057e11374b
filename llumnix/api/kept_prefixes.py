"""Where the KV of ended requests is likely to lie still, as their frontend remembers it: for a request that
goes on from one of them, the next turn of a conversation for one.

A frontend knows every token it delivered and which instance made the last one, after however many moves; that
instance keeps the KV, in its host memory or in vLLM's prefix cache. Conversations are told apart by hashes
over LoRA adapter and the first 64, 128, 256 … tokens, so a few entries find one of any length. What an
instance has room to keep is in the cluster's status; when that is full, what was kept longest ago is
forgotten, as the instance does. Everything here is a hint: a wrong one costs a needless preference, never a
token. Used by the instance directory only.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from llumnix.api.backend import StreamCall
from llumnix.core.messages.control import InstanceStatus

MARK_MIN = 64
HASH_BYTES = 8
HINTS_MAX = 4
KEPT_MAX = 4096  # remembered of one instance, whatever it has room for


@dataclass(slots=True, eq=False)
class Kept:
    """The KV of ``tokens`` tokens that begin with those of ``marks``, the last of which is at most half as
    long again."""

    instance_id: str
    tokens: int
    marks: tuple[bytes, ...]


@dataclass(slots=True, eq=False)
class Shelf:
    """What one process keeps, in at most ``tokens_max`` tokens; kept longest ago first."""

    incarnation: str
    tokens_max: int
    tokens: int = 0
    kept: dict[Kept, None] = field(default_factory=dict)


class KeptPrefixes:
    """See the module. Bounded by KEPT_MAX for each instance of the last status."""

    def __init__(self) -> None:
        self._shelves: dict[str, Shelf] = {}
        self._index: dict[bytes, dict[str, Kept]] = {}

    def update(self, instances: Iterable[InstanceStatus]) -> None:
        """Take the manager's view of who keeps how much. An empty one says nothing."""
        listed = {entry.instance_id: entry for entry in instances}
        for instance_id in list(self._shelves) if listed else ():
            entry = listed.get(instance_id)
            if entry is None or entry.incarnation != self._shelves[instance_id].incarnation:
                self.forget(instance_id)
        for instance_id, entry in listed.items():
            if entry.kept_tokens_max > 0:
                shelf = self._shelves.setdefault(instance_id, Shelf(entry.incarnation, 0))
                shelf.tokens_max = entry.kept_tokens_max

    def forget(self, instance_id: str) -> None:
        """Its process has ended, or another has taken its place."""
        shelf = self._shelves.pop(instance_id, None)
        for kept in shelf.kept if shelf is not None else ():
            self._unlist(kept)

    def ended(self, instance_id: str, call: StreamCall, output: Sequence[int]) -> None:
        """A request has ended well on that instance."""
        shelf = self._shelves.get(instance_id)
        marks = () if shelf is None else tuple(_marks(call, output))
        if shelf is None or not marks:
            return
        before = self._deepest(instance_id, marks)
        if before is not None and before.marks == marks[: len(before.marks)]:
            self._drop(shelf, before)  # this one goes on from it
        kept = Kept(instance_id, len(call.prompt_tokens) + len(output), marks)
        shelf.kept[kept] = None
        shelf.tokens += kept.tokens
        for key in marks:
            holders = self._index.setdefault(key, {})
            holders.pop(instance_id, None)
            holders[instance_id] = kept
        while shelf.tokens > shelf.tokens_max or len(shelf.kept) > KEPT_MAX:
            self._drop(shelf, next(iter(shelf.kept)))

    def find(self, call: StreamCall, output: Sequence[int]) -> tuple[tuple[str, int], ...]:
        """Instances that are likely to have the KV of this beginning, and of about how many of its tokens;
        those that share most first, at most HINTS_MAX."""
        if not self._index:
            return ()
        last = len(call.prompt_tokens) + len(output) - 1  # the KV of the last token is never of use
        found: dict[str, int] = {}
        marks = _marks(call, output)
        for place in range(len(marks) - 1, -1, -1):
            holders = self._index.get(marks[place], {})
            for instance_id in reversed(holders):  # whoever came to it last
                if len(found) == HINTS_MAX:
                    return tuple(found.items())
                kept = holders[instance_id]
                whole = place == len(kept.marks) - 1  # as far as can be told
                found.setdefault(instance_id, min(kept.tokens if whole else MARK_MIN << place, last))
        return tuple(found.items())

    def _deepest(self, instance_id: str, marks: Sequence[bytes]) -> Kept | None:
        """What an instance keeps that shares most marks with these."""
        held = (self._index.get(key, {}).get(instance_id) for key in reversed(marks))
        return next((kept for kept in held if kept is not None), None)

    def _drop(self, shelf: Shelf, kept: Kept) -> None:
        del shelf.kept[kept]
        shelf.tokens -= kept.tokens
        self._unlist(kept)

    def _unlist(self, kept: Kept) -> None:
        for key in kept.marks:
            holders = self._index.get(key, {})
            if holders.get(kept.instance_id) is kept:
                del holders[kept.instance_id]
                if not holders:
                    del self._index[key]


def _marks(call: StreamCall, output: Sequence[int]) -> list[bytes]:
    """Hashes of the first MARK_MIN, twice, four times … as many tokens of prompt + output, each of the
    adapter too."""
    whole = array("I", call.prompt_tokens)
    whole.extend(output)
    adapter = blake2b(call.adapter.encode(), digest_size=HASH_BYTES).digest() if call.adapter else b""
    data, begun = memoryview(whole).cast("B"), blake2b(digest_size=HASH_BYTES, key=adapter)
    marks, start, end = [], 0, MARK_MIN
    while end <= len(whole):
        begun.update(data[start * whole.itemsize : end * whole.itemsize])
        marks.append(begun.copy().digest())
        start, end = end, 2 * end
    return marks
