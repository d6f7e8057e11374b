"""What an instance offers to give away beside what its selection policy puts first."""

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.load import MoveCandidate
from llumnix.instance.move_offers import CANDIDATES_MAX, MoveOffers
from llumnix.policies.selection import Cheapest

NORMAL = [MoveCandidate(f"n{number}", 1 + number, 0, False) for number in range(6)]


def offered(*urgent: MoveCandidate) -> list[str]:
    rows = MoveOffers(Cheapest(SchedulerConfig())).offered([*urgent, *NORMAL])
    return [row.request_id for row in rows]


def test_one_urgent_request_is_offered_behind_all_others() -> None:
    first = [row.request_id for row in NORMAL[:CANDIDATES_MAX]]
    assert offered() == first
    urgent = (MoveCandidate("u0", 9, 1, False), MoveCandidate("u1", 2, 1, False))
    assert offered(*urgent) == [*first, "u1"]
    assert offered(MoveCandidate("waits", 1, 1, True)) == first, "it has no KV yet and slows nobody"
