"""The instances that may take a new request, best first, kept in order as they change.

A placement reads the order and changes one instance; sorting a thousand of them for each would cost more than
the decision itself. Called by the cluster view.
"""

from bisect import bisect_left
from collections.abc import Callable

from llumnix.core.views import InstanceView

Key = tuple[float, str]


class Ranking:
    """Views in falling order of ``score``, then by id. Change and lookup are O(log n) comparisons
    and a memory move; ``views`` is one copy of n pointers, made anew only after a change."""

    def __init__(self, score: Callable[[InstanceView], float]) -> None:
        self._score = score
        self._keys: list[Key] = []
        self._views: list[InstanceView] = []
        self._key_of: dict[str, Key] = {}
        self._tuple: tuple[InstanceView, ...] | None = ()

    def put(self, view: InstanceView) -> None:
        """Enter an instance, or move it to its new place."""
        self.remove(view.instance_id)
        key = (-self._score(view), view.instance_id)
        place = bisect_left(self._keys, key)
        self._keys.insert(place, key)
        self._views.insert(place, view)
        self._key_of[view.instance_id] = key
        self._tuple = None

    def remove(self, instance_id: str) -> None:
        """Take an instance out. Unknown ones are ignored."""
        key = self._key_of.pop(instance_id, None)
        if key is not None:
            place = bisect_left(self._keys, key)
            del self._keys[place]
            del self._views[place]
            self._tuple = None

    @property
    def views(self) -> tuple[InstanceView, ...]:
        """All of them, in order."""
        if self._tuple is None:
            self._tuple = tuple(self._views)
        return self._tuple
