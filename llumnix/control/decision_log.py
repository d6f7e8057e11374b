"""What was decided about each request, and why: the answer to ``llumnix explain``.

Bounded twice: the requests decided about most lately, and the latest decisions about each. A placement adds
one entry on the manager's hot path, so entries are kept as they come and turned into rows only when somebody
asks. Filled by the placer and the rescheduler.
"""

from collections import OrderedDict
from dataclasses import dataclass
from sys import float_info

from llumnix.core.admin import DecisionRow
from llumnix.core.request_names import called

REQUESTS_MAX = 10_000
DECISIONS_MAX = 32


@dataclass(slots=True)
class Decision:
    """One entry; fields as in DecisionRow."""

    at: float
    kind: str
    source_id: str
    instance_id: str
    policy: str
    reason: str
    scores: tuple[tuple[str, float], ...] = ()
    candidates: int = 0


class DecisionLog:
    """Decisions by request id, the request longest without one first."""

    def __init__(self) -> None:
        # An OrderedDict gives up its oldest at once; a dict would step over all it gave up before.
        self._requests: OrderedDict[str, list[Decision]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request_id: str, decision: Decision) -> None:
        """Enter one; the oldest make room for it."""
        decisions = self._requests.get(request_id)
        if decisions is None:
            if len(self._requests) >= REQUESTS_MAX:
                self._requests.popitem(last=False)
            self._requests[request_id] = [decision]
            return
        self._requests.move_to_end(request_id)
        decisions.append(decision)
        if len(decisions) > DECISIONS_MAX:
            del decisions[0]

    def called(self, asked: str) -> tuple[str, ...]:
        """The requests decided about that may be meant, the longest without a decision first."""
        return (asked,) if asked in self._requests else called(asked, self._requests)

    def rows(self, request_id: str, now: float) -> tuple[DecisionRow, ...]:
        """All that is kept about a request, oldest first. A draining instance has no finite score to show,
        and a plug-in may have put anything where scores belong."""
        return tuple(
            DecisionRow(
                now - one.at,
                one.kind,
                one.source_id,
                one.instance_id,
                one.policy,
                one.reason,
                _shown(one.scores),
                one.candidates,
            )
            for one in self._requests.get(request_id, ())
        )


def _shown(scores: object) -> tuple[tuple[str, float], ...]:
    """Those that are a name and a finite number."""
    if not isinstance(scores, tuple):
        return ()
    pairs = [pair for pair in scores if isinstance(pair, tuple) and len(pair) == 2]
    return tuple(
        (name, score)
        for name, score in pairs
        if isinstance(name, str) and isinstance(score, int | float) and abs(score) <= float_info.max
    )
