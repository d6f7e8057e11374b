"""Answers a frontend's Place: which instance takes this request, or why none does.

The hot path of the manager: one policy decision over an order that is kept up to date, and one instance's
view made anew. For a request with a LoRA adapter those that have it at hand and are not much busier than the
freest are what the policy, whichever it is, chooses from. Called by the global scheduler only.
"""

from llumnix.control.cluster_view import ClusterView
from llumnix.control.decision_log import Decision, DecisionLog
from llumnix.control.instance_record import InstanceRecord
from llumnix.control.policy_guard import GuardedDispatch, GuardedRoles
from llumnix.control.ranking import Candidates
from llumnix.core.messages.control import InstanceState, NotPlaced, Place, Placed
from llumnix.core.views import KeptPrefix, RequestView

RETRY_SOON_S = 0.1
RETRY_LATER_S = 1.0
NO_USE_S = 0.0
KEPT_CONSIDERED_MAX = 4


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
        urgent, adapter = place.scheduling_priority > 0 and place.execution_priority > 0, place.adapter
        entry = self._cluster.candidates(tokens, place.exclude, decode=False, urgent=urgent, adapter=adapter)
        decode = self._cluster.candidates(tokens, place.exclude, decode=True, adapter=adapter)
        entries, decoders = len(entry), len(decode)
        candidates = entry if entries else decode
        if not entries and not decoders:
            return self._refused(self._nobody(place, tokens), "", now)
        first = candidates.records[0]
        asked = (
            place.request_id,
            first.blocks(tokens),
            place.prompt_tokens,
            place.max_tokens,
            place.scheduling_priority,
            place.execution_priority,
            place.tenant,
            adapter,
        )
        reasons, decoding = [], not entries
        if entries and decoders:
            entered = self._roles.enter(RequestView(*asked), entry[0], decode[0], now)
            reasons, decoding = [entered.reason], entered.decode
            candidates = decode if decoding else entry
        considered = decoders if decoding else entries
        if adapter:
            near = self._cluster.with_adapter_at_hand(
                candidates, tokens, place.exclude, decode=decoding, urgent=urgent, adapter=adapter
            )
            reasons.insert(0, _whether_near(near, considered, adapter))
            candidates = near or candidates
        request = RequestView(*asked, self._kept(place, tokens, decoding) if place.kept else ())
        decision = self._policy.place(request, candidates, now)
        if decision.instance_id is None:
            answer = NotPlaced(place.request_id, decision.reason, RETRY_LATER_S)
            return self._refused(answer, self._policy.name, now)
        chosen = self._candidate(decision.instance_id, place, tokens, decoding)
        if chosen is None:
            fault = f"chose {decision.instance_id!r}, which was no candidate"
            decision = self._policy.overrule(request, candidates, fault, now)
            chosen = self._candidate(decision.instance_id, place, tokens, decoding) or first
        instance_id = chosen.instance_id
        reason = "; ".join([decision.reason, *filter(None, reasons)]) if reasons else decision.reason
        self._cluster.place(chosen, place.request_id, tokens, now, adapter)
        self._log.add(
            place.request_id,
            Decision(
                now,
                "placed",
                "",
                instance_id,
                self._policy.name,
                reason,
                decision.scores,
                considered,
            ),
        )
        return Placed(place.request_id, instance_id, chosen.hello.address)

    def _candidate(
        self, instance_id: object, place: Place, tokens: int, decode: bool
    ) -> InstanceRecord | None:
        """The record of a policy's choice, if it was one to choose."""
        if not isinstance(instance_id, str):
            return None
        return self._cluster.candidate(
            instance_id, tokens, place.exclude, decode=decode, adapter=place.adapter
        )

    def _kept(self, place: Place, tokens: int, decode: bool) -> tuple[KeptPrefix, ...]:
        """Which of the instances that a frontend names may be chosen, and what each has."""
        kept = []
        for instance_id, prefix_tokens in place.kept[:KEPT_CONSIDERED_MAX]:
            record = self._cluster.candidate(
                instance_id, tokens, place.exclude, decode=decode, adapter=place.adapter
            )
            if record is not None:
                blocks = max(0, min(prefix_tokens, tokens)) // record.block_size
                kept.append(KeptPrefix(record.seen, blocks))
        return tuple(kept)

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
        if not any(record.serves(place.adapter) for record in serving):
            reason = f"no serving instance has the LoRA adapter {place.adapter}"
            known = any(record.serves(place.adapter) for record in self._cluster.records())
            return NotPlaced(place.request_id, reason, RETRY_LATER_S if known else NO_USE_S)
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


def _whether_near(near: Candidates, able: int, adapter: str) -> str:
    if near:
        return f"{len(near)} of {able} have adapter {adapter} at hand"
    return f"adapter {adapter} is to be loaded: nobody free enough has it"
