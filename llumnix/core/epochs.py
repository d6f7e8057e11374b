"""Owner epochs: which instance may speak for a request right now.

An epoch is one int, compared as a whole: ``generation << HOP_BITS | hop``.

- The frontend alone makes generations. It starts a request at generation 1, or at that of ``epoch_at`` if a
  caller chose its id, and takes the next one whenever it continues the request elsewhere because its owner
  died or forgot it.
- Instances alone make hops. A migration's target decodes at hop + 1. A source that resumes after its target
  was fenced with the commit unanswered takes hop + RESUME_HOPS: the dead target may have decoded at hop + 1,
  and may have passed the request on, to one that decodes at hop + 2, and so on.

So no two instances ever decode one request in one epoch, and the frontend needs only one rule: the highest
epoch seen wins, anything lower is told to stop.
"""

HOP_BITS = 20
HOP_MAX = (1 << HOP_BITS) - 1
FIRST_EPOCH = 1 << HOP_BITS
EPOCH_MAX = (1 << 63) - 1
RESUME_HOPS = 1 << 10
"""More moves than a request can make while one commit is unanswered."""


def epoch_at(milliseconds: int) -> int:
    """The first epoch of a request whose id may have been used before: its generation is the time since 1970,
    so that instances that remember an earlier one see a new request and not a message said twice."""
    return milliseconds << HOP_BITS


def next_generation(epoch: int) -> int:
    """The epoch a frontend gives a continuation of a request last seen at ``epoch``."""
    return ((epoch >> HOP_BITS) + 1) << HOP_BITS


def next_hop(epoch: int, hops: int = 1) -> int:
    """The epoch ``hops`` moves after ``epoch`` within its generation. Raises OverflowError past HOP_MAX
    moves."""
    if (epoch & HOP_MAX) + hops > HOP_MAX:
        raise OverflowError(f"request moved more than {HOP_MAX} times in one generation")
    return epoch + hops
