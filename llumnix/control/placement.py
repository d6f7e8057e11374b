"""Answers a frontend's Place: which instance takes this request, or why none does.

The hot path of the manager: one policy decision over an order that is kept up to date, and one instance's
view made anew. Called by the global scheduler only.
"""

from llumnix.control.cluster_view import ClusterView
from llumnix.control.effects import Logged
from llumnix.core.config import SchedulerConfig
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import InstanceState, NotPlaced, Place, Placed
from llumnix.core.views import RequestView
from llumnix.policies.registry import dispatch_policy

RETRY_SOON_S = 0.1
RETRY_LATER_S = 1.0
NO_USE_S = 0.0


class Placer:
    """Runs the dispatch policy."""

    def __init__(self, config: SchedulerConfig, cluster: ClusterView) -> None:
        self._cluster = cluster
        self._policy = dispatch_policy(config)
        score = getattr(self._policy, "score", None)
        if score is not None:
            cluster.rank_by(score)

    def place(self, place: Place, now: float) -> tuple[Placed | NotPlaced, Logged | None]:
        """The answer, and what an operator should know of it."""
        tokens = place.prompt_tokens + 1  # a request that can make no token is of no use anywhere
        candidates = self._cluster.candidates(tokens, place.exclude)
        if not candidates:
            return self._nobody(place, tokens), None
        first = self._cluster.get(candidates[0].instance_id)
        if first is None:
            raise InvariantError(f"{candidates[0].instance_id} is ranked without a record")
        request = RequestView(
            request_id=place.request_id,
            blocks=first.blocks(tokens),
            prompt_tokens=place.prompt_tokens,
            max_tokens=place.max_tokens,
            scheduling_priority=place.scheduling_priority,
            execution_priority=place.execution_priority,
            tenant=place.tenant,
        )
        decision = self._policy.place(request, candidates)
        if decision.instance_id is None:
            return NotPlaced(place.request_id, decision.reason, RETRY_LATER_S), None
        logged = None
        chosen = self._cluster.get(decision.instance_id)
        if (
            chosen is None
            or chosen.state is not InstanceState.SERVING
            or decision.instance_id in place.exclude
            or tokens > chosen.tokens_max
        ):
            text = f"dispatch policy chose {decision.instance_id}, which was no candidate; took the freest"
            logged = Logged("policy_error", text, {"request": place.request_id})
            chosen = first
        self._cluster.place(chosen, place.request_id, tokens, now)
        return Placed(place.request_id, chosen.hello.instance_id, chosen.hello.address), logged

    def _nobody(self, place: Place, tokens: int) -> NotPlaced:
        """Why there is no candidate."""
        live = self._cluster.live()
        serving = [record for record in live if record.state is InstanceState.SERVING]
        if not serving:
            starting = any(record.state is InstanceState.STARTING for record in live)
            reason = "no instance is serving"
            return NotPlaced(place.request_id, reason, RETRY_SOON_S if starting else RETRY_LATER_S)
        longest = max(record.tokens_max for record in live)
        if tokens > longest:
            reason = (
                f"a prompt of {place.prompt_tokens} tokens fits no instance: the longest request is {longest}"
            )
            return NotPlaced(place.request_id, reason, NO_USE_S)
        if all(record.hello.instance_id in place.exclude for record in serving):
            reason = "every serving instance has just failed this request"
            return NotPlaced(place.request_id, reason, RETRY_SOON_S)
        return NotPlaced(place.request_id, "every instance's queue is full", RETRY_LATER_S)
