"""Administrators' orders that need the instances' word: list the requests, move one of them.

The manager keeps no list of requests, so both begin by asking every instance (inquiries.py). Called by the
global scheduler only.
"""

from llumnix.control.cluster_view import ClusterView
from llumnix.control.effects import Answered, Effect, Logged
from llumnix.control.inquiries import ASK_TIMEOUT_S, INQUIRIES_MAX, Inquiries, Inquiry
from llumnix.control.rescheduler import Ended, Rescheduler
from llumnix.core.admin import Refusal
from llumnix.core.effects import Send
from llumnix.core.messages.control import InstanceState, ListRequests, RequestList, RequestRow
from llumnix.core.request_names import ambiguous
from llumnix.core.views import Move


class Orders:
    """Carries open inquiries from question to answer. ``address`` is where instances answer to."""

    def __init__(
        self, manager_incarnation: str, address: str, cluster: ClusterView, rescheduler: Rescheduler
    ) -> None:
        self._address = address
        self._cluster = cluster
        self._rescheduler = rescheduler
        self._inquiries = Inquiries(manager_incarnation)

    def ask_requests(self, now: float) -> tuple[str, list[Effect]]:
        """Ask for every request."""
        return self._ask("", "", now)

    def ask_migrate(self, request_id: str, target_id: str, now: float) -> tuple[str, list[Effect]]:
        """Refuse at once what cannot be, else ask who holds the request."""
        target = self._cluster.get(target_id)
        if target is None:
            return self._refuse(f"there is no instance {target_id}")
        if target.state is not InstanceState.SERVING:
            return self._refuse(f"{target_id} is {target.state.value}")
        if self._cluster.moves.is_moving(request_id):
            return self._refuse(f"{request_id} is moving already")
        return self._ask(request_id, target_id, now)

    def heard(self, message: RequestList, now: float) -> list[Effect]:
        """An instance has answered."""
        inquiry = self._inquiries.heard(message)
        return self._pursue(inquiry, now) if inquiry is not None else []

    def instance_ended(self, instance_id: str, now: float) -> list[Effect]:
        """An instance will not answer any more."""
        affected = self._inquiries.instance_ended(instance_id)
        return [effect for inquiry in affected for effect in self._pursue(inquiry, now)]

    def expire(self, now: float) -> list[Effect]:
        """Answer what has waited long enough with what is known."""
        effects: list[Effect] = []
        for inquiry in self._inquiries.overdue(now):
            inquiry.waiting_for.clear()
            effects += self._pursue(inquiry, now)
        return effects

    def migration_ended(self, ended: Ended) -> list[Effect]:
        """Log it, and answer whoever waits for it."""
        inquiry = self._inquiries.moving(ended.result.migration_id)
        if inquiry is None:
            return [ended.logged]
        self._inquiries.close(inquiry)
        return [ended.logged, Answered(inquiry.query_id, ended.result)]

    def next_deadline(self) -> float | None:
        """When `expire` has something to do."""
        return self._inquiries.next_deadline()

    def _ask(self, request_id: str, target_id: str, now: float) -> tuple[str, list[Effect]]:
        if self._inquiries.full():
            return self._refuse(f"{INQUIRIES_MAX} questions are waiting for answers")
        query_id = self._inquiries.new_id()
        live = self._cluster.live()
        waiting_for = dict.fromkeys(record.hello.instance_id for record in live)
        inquiry = Inquiry(query_id, now + ASK_TIMEOUT_S, waiting_for, request_id, target_id)
        self._inquiries.open(inquiry)
        if not live:
            return query_id, self._pursue(inquiry, now)
        question = ListRequests(query_id, self._address)
        return query_id, [Send(record.hello.address, question) for record in live]

    def _refuse(self, reason: str) -> tuple[str, list[Effect]]:
        query_id = self._inquiries.new_id()
        return query_id, [
            Answered(query_id, Refusal(reason)),
            Logged("order_refused", reason),
        ]

    def _pursue(self, inquiry: Inquiry, now: float) -> list[Effect]:
        """Go on with an inquiry after news: answer it, order its migration, or wait for more."""
        if inquiry.migration_id:
            return []
        if not inquiry.request_id:
            if inquiry.waiting_for:
                return []
            self._inquiries.close(inquiry)
            return [Answered(inquiry.query_id, inquiry.all_rows())]
        meant = inquiry.meant()
        if meant != (inquiry.request_id,) and inquiry.waiting_for:
            return []  # others may be called the same
        if len(meant) != 1:
            wrong = ambiguous(inquiry.request_id, meant) if meant else self._not_found(inquiry)
            return self._answer_refusal(inquiry, wrong)
        return self._move(inquiry, inquiry.found(meant[0]), now)

    def _move(self, inquiry: Inquiry, row: RequestRow, now: float) -> list[Effect]:
        """The request is found: order its migration."""
        move = Move(row.request_id, row.instance_id, inquiry.target_id, "ordered by an administrator")
        wrong = self._rescheduler.unfit(move, row.adapter)
        if wrong:
            return self._answer_refusal(inquiry, f"{row.request_id} cannot move: {wrong}")
        source = self._cluster.get(row.instance_id)
        blocks = row.blocks or (source.blocks(row.prompt_tokens + row.output_tokens) if source else 0)
        inquiry.migration_id, effects = self._rescheduler.order(move, blocks, now)
        return list(effects)

    def _not_found(self, inquiry: Inquiry) -> str:
        silent = [record.hello.instance_id for record in self._cluster.live()]
        silent = [instance_id for instance_id in silent if instance_id not in inquiry.rows]
        unheard = f"; no answer from {', '.join(silent)}" if silent else ""
        return f"no instance holds a request {inquiry.request_id}{unheard}"

    def _answer_refusal(self, inquiry: Inquiry, reason: str) -> list[Effect]:
        self._inquiries.close(inquiry)
        return [Answered(inquiry.query_id, Refusal(reason)), Logged("order_refused", reason)]
