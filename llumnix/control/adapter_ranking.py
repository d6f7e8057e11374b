"""A ranking that also answers for requests with a LoRA adapter: who serves it, and who has it at hand.

Looking through all instances for that takes many times as long as a placement, so these are kept in order as
well, from the first question on: a cluster without adapters does not pay for it. Mostly all instances serve
the same adapters: then those that serve one are the ranking itself. Where some serve other adapters than the
rest, those that serve the same have an order of their own. An instance has few adapters at hand, as many as
its memory has room for, and is entered once for each. Called by the cluster view.
"""

from collections import Counter
from collections.abc import Hashable
from typing import TypeVar

from llumnix.control.instance_record import InstanceRecord
from llumnix.control.ranking import Candidates, Merged, Ranking, ViewOf, known_view

Name = TypeVar("Name", bound=Hashable)


class AdapterRanking(Ranking):
    """See the module. What adapters an instance serves does not change while it is entered."""

    def __init__(self, view_of: ViewOf = known_view) -> None:
        super().__init__(view_of)
        self._served: Counter[frozenset[str]] = Counter()
        self._serving: dict[frozenset[str], Ranking] | None = None
        self._at_hand: dict[str, Ranking] | None = None
        self._held: dict[str, tuple[str, ...]] = {}

    def put(self, record: InstanceRecord, score: float) -> None:
        """Enter an instance that has reported, or move it to its new place."""
        before = len(self._records)
        super().put(record, score)
        if len(self._records) > before:
            self._served[record.adapters] += 1
        if self._serving is not None:
            self._enter(self._serving, record.adapters, record, score)
        if self._at_hand is not None:
            self._hold(self._at_hand, record, score)

    def remove(self, instance_id: str) -> InstanceRecord | None:
        """Take an instance out, and return it. Unknown ones are ignored."""
        record = super().remove(instance_id) if self.has(instance_id) else None
        if record is None:
            return None
        if self._serving is not None:
            _take_out(self._serving, record.adapters, instance_id)
        self._served[record.adapters] -= 1
        if not self._served[record.adapters]:
            del self._served[record.adapters]
            if len(self._served) < 2:
                self._serving = None
        if self._at_hand is not None:
            for adapter in self._held.pop(instance_id, ()):
                _take_out(self._at_hand, adapter, instance_id)
        return record

    def serving(self, adapter: str) -> Candidates:
        """Those that serve it, in the same order."""
        able = [served for served in self._served if adapter in served]
        if len(able) == len(self._served):
            return self
        if self._serving is None:
            self._serving = {}
            for (score, _), record in self.entries():
                self._enter(self._serving, record.adapters, record, -score)
        rankings = [self._serving[served] for served in able]
        return rankings[0] if len(rankings) == 1 else Candidates(Merged(rankings), self.view_of)

    def at_hand(self, adapter: str) -> Ranking:
        """Those that serve it and have it at hand, in the same order."""
        if self._at_hand is None:
            self._at_hand = {}
            for (score, _), record in self.entries():
                self._hold(self._at_hand, record, -score)
        return self._at_hand.get(adapter) or Ranking(self.view_of)

    def _hold(self, rankings: dict[str, Ranking], record: InstanceRecord, score: float) -> None:
        held = record.at_hand
        before = self._held.get(record.instance_id, ())
        if held != before:
            self._held[record.instance_id] = held
            for adapter in before:
                if adapter not in held:
                    _take_out(rankings, adapter, record.instance_id)
        for adapter in held:
            self._enter(rankings, adapter, record, score)

    def _enter(self, rankings: dict[Name, Ranking], name: Name, record: InstanceRecord, score: float) -> None:
        ranking = rankings.get(name)
        if ranking is None:
            ranking = rankings[name] = Ranking(self.view_of)
        ranking.put(record, score)


def _take_out(rankings: dict[Name, Ranking], name: Name, instance_id: str) -> None:
    rankings[name].remove(instance_id)
    if not rankings[name]:
        del rankings[name]
