"""Answers a frontend's Place: which instance takes this request, or why none does.

The hot path of the manager: one policy decision over an order that is kept up to date, and one instance's
view made anew. Called by the global scheduler only.
"""

from llumnix.control.cluster_view import ClusterView
from llumnix.control.decision_log import Decision, DecisionLog
from llumnix.control.instance_record import InstanceRecord
from llumnix.control.policy_guard import GuardedDispatch, GuardedRoles
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import InstanceRole, InstanceState, NotPlaced, Place, Placed
from llumnix.core.views import RequestView

RETRY_SOON_S = 0.1
RETRY_LATER_S = 1.0
NO_USE_S = 0.0


class Placer:
    """Runs the dispatch policy and, where there are instances that decode only, before it the roles
    policy."""

    def __init__(
        self, policy: GuardedDispatch, roles: GuardedRoles, cluster: ClusterView, log: DecisionLog
    ) -> None:
        self._cluster = cluster
        self._log = log
        self.use(policy, roles)

    def use(self, policy: GuardedDispatch, roles: GuardedRoles) -> None:
        """Decide by these policies from now on."""
        self._policy, self._roles = policy, roles
        self._cluster.rank_by(policy.score)

    def place(self, place: Place, now: float) -> Placed | NotPlaced:
        """The answer. It is in the decision log."""
        tokens = place.prompt_tokens + 1  # a request that can make no token is of no use anywhere
        urgent = place.scheduling_priority > 0 and place.execution_priority > 0
        entry = self._cluster.candidates(tokens, place.exclude, decode=False, urgent=urgent)
        decode = self._cluster.candidates(tokens, place.exclude, decode=True)
        candidates = entry or decode
        if not candidates:
            return self._refused(self._nobody(place, tokens), "", now)
        first = self._cluster.get(candidates[0].instance_id)
        if first is None:
            raise InvariantError(f"{candidates[0].instance_id} is ranked without a record")
        request = RequestView(
            place.request_id,
            first.blocks(tokens),
            place.prompt_tokens,
            place.max_tokens,
            place.scheduling_priority,
            place.execution_priority,
            place.tenant,
        )
        role_reason = ""
        if entry and decode:
            entered = self._roles.enter(request, entry[0], decode[0], now)
            role_reason = entered.reason
            candidates = decode if entered.decode else entry
        decision = self._policy.place(request, candidates, now)
        if decision.instance_id is None:
            answer = NotPlaced(place.request_id, decision.reason, RETRY_LATER_S)
            return self._refused(answer, self._policy.name, now)
        chosen = self._candidate(decision.instance_id, place, tokens, candidates is decode)
        if chosen is None:
            fault = f"chose {decision.instance_id!r}, which was no candidate"
            decision = self._policy.overrule(request, candidates, fault, now)
            chosen = self._candidate(decision.instance_id, place, tokens, candidates is decode) or first
        instance_id = chosen.instance_id
        self._cluster.place(chosen, place.request_id, tokens, now)
        self._log.add(
            place.request_id,
            Decision(
                now,
                "placed",
                "",
                instance_id,
                self._policy.name,
                f"{decision.reason}; {role_reason}" if role_reason else decision.reason,
                decision.scores,
                len(candidates),
            ),
        )
        return Placed(place.request_id, instance_id, chosen.hello.address)

    def _candidate(
        self, instance_id: object, place: Place, tokens: int, decode: bool
    ) -> InstanceRecord | None:
        """The record of a policy's choice, if it was one to choose."""
        record = self._cluster.get(instance_id) if isinstance(instance_id, str) else None
        if (
            record is None
            or record.state is not InstanceState.SERVING
            or (record.role is InstanceRole.DECODE) is not decode
            or instance_id in place.exclude
            or tokens > record.tokens_max
        ):
            return None
        return record

    def _refused(self, answer: NotPlaced, policy: str, now: float) -> NotPlaced:
        self._log.add(answer.request_id, Decision(now, "not placed", "", "", policy, answer.reason))
        return answer

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
        if all(record.instance_id in place.exclude for record in serving):
            reason = "every serving instance has just refused this request or lost it"
            return NotPlaced(place.request_id, reason, RETRY_SOON_S)
        return NotPlaced(place.request_id, "every instance's queue is full", RETRY_LATER_S)
