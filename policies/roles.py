"""Prefill and decode on instances of their own: where a request enters, and when it goes over.

A long prefill beside decodes delays them all; on instances of its own it delays nobody but other prefills
(disaggregation: DistServe, OSDI'24; Splitwise, ISCA'24). Here the hand-over is an ordinary live migration, so
whatever is full on one side can be done on the other. Called by the placer for every request once an instance
has the role decode, and by the control plane for requests on an instance whose role does not suit them.
"""

from collections.abc import Sequence

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceRole
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.roles import suits
from llumnix.core.views import EntryDecision, InstanceView, Move, RequestView
from llumnix.policies.freeness import Load, free_blocks


class Disaggregate:
    """New requests enter at prefill and neutral instances and go over when their prefill has ended.

    It spills over both ways. While the freest that prefills is below the low mark and a decode instance is
    above the high one, with room, new requests enter there. While no decode instance would stay above the low
    mark, requests decode where they are."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config

    def enter(self, request: RequestView, entry: InstanceView, decode: InstanceView) -> EntryDecision:
        """See the class."""
        low, high = self._config.low_freeness, self._config.high_freeness
        scores = ((entry.instance_id, entry.queue_freeness), (decode.instance_id, decode.queue_freeness))
        if (
            entry.queue_freeness < low
            and decode.queue_freeness > high
            and free_blocks(decode) >= request.blocks
        ):
            reason = f"spills over: the freest to prefill is below {low:g}"
            return EntryDecision(True, scores, f"{reason}, {decode.instance_id} above {high:g}")
        return EntryDecision(False, scores, "")

    def leave(
        self, request: MoveCandidate, source: InstanceView, targets: Sequence[InstanceView]
    ) -> Move | None:
        """The first target whose role suits and that keeps its mark: the low one for a request that decodes,
        the high one for one that waits, which may as well wait where it is."""
        config = self._config
        mark = config.high_freeness if request.waiting else config.low_freeness
        blocks = Load.of(source).demand(request)
        for target in targets:
            after = Load.of(target).joined(request, blocks).queue_freeness(target.headroom_blocks)
            if suits(target.role, request.prefills) and after > mark:
                return _move(request, source, target, f"leaves it at {after:.1f}, above {mark:g}")
        return None


class Strict:
    """The same without spilling over: a role is kept whatever the load. A request waits where it prefills
    and goes over as soon as a decode instance has room for it."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def enter(self, request: RequestView, entry: InstanceView, decode: InstanceView) -> EntryDecision:
        """Never at a decode instance."""
        return EntryDecision(False, ((entry.instance_id, entry.queue_freeness),), "")

    def leave(
        self, request: MoveCandidate, source: InstanceView, targets: Sequence[InstanceView]
    ) -> Move | None:
        """The first target whose role suits and that has room."""
        blocks = Load.of(source).demand(request)
        for target in targets:
            if suits(target.role, request.prefills) and (request.waiting or free_blocks(target) > blocks):
                return _move(request, source, target, "has room")
        return None


def _move(request: MoveCandidate, source: InstanceView, target: InstanceView, fit: str) -> Move:
    what = "waits at a decode instance" if request.waiting else "prefill ended"
    neutral = target.role is InstanceRole.NEUTRAL
    reason = f"{what}: {target.instance_id} ({'neutral, ' if neutral else ''}freest) {fit}"
    scores = tuple((view.instance_id, view.queue_freeness) for view in (source, target))
    return Move(request.request_id, source.instance_id, target.instance_id, reason, scores)
