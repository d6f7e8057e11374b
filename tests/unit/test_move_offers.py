"""What an instance offers to give away beside what its selection policy puts first."""

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.load import MoveCandidate
from llumnix.instance.move_offers import CANDIDATES_MAX, ROOM_CANDIDATES_MAX, MoveOffers
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


def test_while_the_head_lacks_blocks_those_are_offered_that_could_make_room_for_it() -> None:
    """After the four cheapest: the largest that frees no more than is missing, and so on down; then up."""
    rows = [MoveCandidate(f"n{blocks}", blocks, 0, False) for blocks in range(1, 41)]
    rows += [MoveCandidate("urgent", 20, 1, False), MoveCandidate("waits", 20, 0, True)]
    offers = MoveOffers(Cheapest(SchedulerConfig()))
    cheapest = [row.request_id for row in offers.offered(rows)]
    assert cheapest == ["waits", "n1", "n2", "n3", "urgent"]
    for missing in (30, 8):
        names = [row.request_id for row in offers.offered(rows, missing)]
        assert names[:5] == cheapest and len(names) == 5 + ROOM_CANDIDATES_MAX
        below = [f"n{blocks}" for blocks in range(missing, 3, -1)]
        above = [f"n{blocks}" for blocks in range(missing + 1, 41)]
        assert names[5:] == (below + above)[:ROOM_CANDIDATES_MAX]
