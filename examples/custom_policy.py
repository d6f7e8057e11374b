"""A dispatch policy of one's own: a tenant's requests stay together on one instance while it has room.

Serve with it, or try it in virtual time (`docs/policies.md` says more):

    PYTHONPATH=examples llumnix serve --engine simulated --dispatch-policy custom_policy:TenantAffinity
    PYTHONPATH=examples llumnix simulate --tenant a=1 --tenant b=2 --policy custom_policy:TenantAffinity/none
"""

from collections.abc import Sequence
from hashlib import sha256

from llumnix.core.config import SchedulerConfig
from llumnix.core.views import DispatchDecision, InstanceView, RequestView
from llumnix.policies.freeness import Load


class TenantAffinity:
    """Each tenant ranks the instances in an order of its own (rendezvous hashing), so that tenants spread and
    an instance that comes or goes moves few of them. The first with room for the prompt gets the request."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting. Every policy is constructed with the scheduler's."""

    def place(self, request: RequestView, candidates: Sequence[InstanceView]) -> DispatchDecision:
        """``candidates`` come freest first. A request without a tenant goes to the freest."""
        freest = candidates[0]
        if not request.tenant:
            return DispatchDecision(freest.instance_id, (), "no tenant: the freest")

        def liking(view: InstanceView) -> bytes:
            return sha256(f"{request.tenant}@{view.instance_id}".encode()).digest()

        for view in sorted(candidates, key=liking, reverse=True):
            if Load.of(view).free_blocks >= request.blocks:
                return DispatchDecision(view.instance_id, (), f"{request.tenant}'s first choice with room")
        return DispatchDecision(freest.instance_id, (), "no instance has room: the freest")
