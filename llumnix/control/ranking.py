"""The instances that may take a new request, best first, kept in order as they change.

A placement reads the order and changes one instance; sorting a thousand of them for each would cost more than
the decision itself. So would making views nobody looks at: the order holds records, and a view is made when
it is read. Called by the cluster view.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import merge
from itertools import islice
from typing import overload

from llumnix.control.instance_record import InstanceRecord
from llumnix.core.views import InstanceView

Key = tuple[float, str]
ViewOf = Callable[[InstanceRecord], InstanceView]
AFTER_ALL_IDS = "\U0010ffff"


def known_view(record: InstanceRecord) -> InstanceView:
    """The view of an instance that has reported, made if need be."""
    return record.known_view or record.seen


class Candidates(Sequence[InstanceView]):
    """Instances in some order; each view is made (by ``view_of``) when it is looked at."""

    def __init__(self, records: Sequence[InstanceRecord], view_of: ViewOf = known_view) -> None:
        self._records = records
        self.view_of = view_of

    @property
    def records(self) -> Sequence[InstanceRecord]:
        """The same in the manager's own form. Read only."""
        return self._records

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[InstanceView]:
        return map(self.view_of, self._records)

    @overload
    def __getitem__(self, index: int) -> InstanceView: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[InstanceView, ...]: ...
    def __getitem__(self, index: int | slice) -> InstanceView | tuple[InstanceView, ...]:
        if isinstance(index, slice):
            return tuple([self.view_of(record) for record in self._records[index]])
        return self.view_of(self._records[index])


class Ranking(Candidates):
    """Views of the instances entered, in falling order of their scores, then by id. Change and lookup are
    O(log n) comparisons and a memory move. What is read is the order as it is at that moment."""

    def __init__(self, view_of: ViewOf = known_view) -> None:
        self._records: list[InstanceRecord] = []
        super().__init__(self._records, view_of)
        self._keys: list[Key] = []
        self._key_of: dict[str, Key] = {}

    def put(self, record: InstanceRecord, score: float) -> None:
        """Enter an instance that has reported, or move it to its new place."""
        instance_id = record.instance_id
        key = (-score, instance_id)
        old = self._key_of.get(instance_id)
        if old is not None:
            place = bisect_left(self._keys, old)
            if old == key:
                self._records[place] = record
                return
            del self._keys[place]
            del self._records[place]
        place = bisect_left(self._keys, key)
        self._keys.insert(place, key)
        self._records.insert(place, record)
        self._key_of[instance_id] = key

    def remove(self, instance_id: str) -> InstanceRecord | None:
        """Take an instance out, and return it. Unknown ones are ignored."""
        key = self._key_of.pop(instance_id, None)
        if key is None:
            return None
        place = bisect_left(self._keys, key)
        del self._keys[place]
        return self._records.pop(place)

    def has(self, instance_id: str) -> bool:
        """Whether an instance is entered."""
        return instance_id in self._key_of

    def down_to(self, score: float) -> Candidates:
        """Those of at least that score."""
        return Candidates(self._records[: bisect_right(self._keys, (-score, AFTER_ALL_IDS))], self.view_of)

    def entries(self) -> Iterable[tuple[Key, InstanceRecord]]:
        """Records with what they are in order of."""
        return zip(self._keys, self._records, strict=True)


class Merged(Sequence[InstanceRecord]):
    """The records of rankings of different instances in one order, put together as far as it is read."""

    def __init__(self, rankings: list[Ranking]) -> None:
        self._rankings = rankings

    def __len__(self) -> int:
        return sum([len(ranking) for ranking in self._rankings])

    def __iter__(self) -> Iterator[InstanceRecord]:
        return (record for _, record in merge(*[one.entries() for one in self._rankings]))

    @overload
    def __getitem__(self, index: int) -> InstanceRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[InstanceRecord]: ...
    def __getitem__(self, index: int | slice) -> InstanceRecord | list[InstanceRecord]:
        wanted = range(len(self))[index]
        if isinstance(wanted, int):
            return next(islice(self, wanted, None))
        first = list(islice(self, max(wanted, default=-1) + 1))
        return [first[place] for place in wanted]
