"""Bounded memory of what was: the latest entries of a mapping. Used by the agent's parts."""

from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Latest(OrderedDict[K, V]):
    """The last ``most`` entries to be remembered, oldest first. Remembering a key again makes it the
    newest."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def remember(self, key: K, value: V) -> None:
        """Set an entry, and forget the oldest if there are too many."""
        self[key] = value
        self.move_to_end(key)
        if len(self) > self._most:
            self.popitem(last=False)
