"""A source's migration once its commit is sent: the request is in no batch here, and the target decides.

The source resumes the request in two cases only. Denied or refused: the target never had it, so the
source's own epoch still stands. Fenced: the target may have decoded at the next hop before it died, or moved
the request on, so the source takes a hop beyond all that (RESUME_HOPS). It lets go of the request unanswered
if its client is gone (an abort of all hops of its generation), if a newer generation has come, or if ASKS_MAX
questions brought no answer: a target may die unheard of. Nothing is lost: the frontend, told that nobody
holds it, goes on elsewhere.

The states are those of source.py, whose table names these actions.
"""

from llumnix.core.effects import Send
from llumnix.core.epochs import HOP_MAX, RESUME_HOPS, next_hop
from llumnix.core.errors import ProtocolError
from llumnix.core.messages.migration import Committed, Denied, QueryCommit, Refused
from llumnix.core.messages.serving import Abort
from llumnix.migration.events import ClientAbort
from llumnix.migration.source_state import OpenMigration, S

ASKS_MAX = 12
"""Unanswered questions about a commit after which its request is left to its frontend."""


class SentCommit(OpenMigration):
    """The part of a migration that begins when its request is taken out."""

    _asks_left = ASKS_MAX

    def _committed(self, event: Committed, now: float) -> list[Send]:
        epoch = next_hop(self.spec.epoch)
        if event.epoch != epoch:
            raise ProtocolError(f"Committed at epoch {event.epoch}, expected {epoch}: {self.story()}")
        self._copying.committed(event, now)
        self._engine.release(self.order.request_id)
        told = Send(self.spec.frontend_address, self.moved)
        return [told, *self._end(S.COMMITTED, self._copying.explained(self.order.reason), now)]

    def _denied(self, event: Denied, now: float) -> list[Send]:
        self._put_back()
        return self._target_said_no(event, now)

    def _commit_refused(self, event: Refused, now: float) -> list[Send]:
        self._put_back()
        return self._refused(event, now)

    def _put_back(self) -> None:
        """The target never had it."""
        self._engine.put_back(self.order.request_id, self.spec.epoch)

    def _resume(self, event: object, now: float) -> list[Send]:
        self._engine.put_back(self.order.request_id, next_hop(self.spec.epoch, RESUME_HOPS))
        return self._end(S.RESUMED, "the target ended before it answered the commit", now)

    def _ask(self, event: object, now: float) -> list[Send]:
        if self._asks_left == 0:
            self._engine.release(self.order.request_id)
            return self._give_up("the target never answered the commit", now)
        self._asks_left -= 1
        self.state = S.COMMIT_UNKNOWN
        self._wait(now)
        return [self._send(QueryCommit(self.migration_id, self._me.address))]

    def _abort_everywhere(self, event: ClientAbort, now: float) -> list[Send]:
        """One that only tells a stale owner to stop says nothing about the next, and changes nothing."""
        if event.epoch < self.spec.epoch | HOP_MAX:
            return []
        self._engine.release(self.order.request_id)
        there = self._send(Abort(self.order.request_id, event.epoch))
        return [*self._give_up("its client stopped the request", now), there]

    def _superseded_late(self, event: object, now: float) -> list[Send]:
        self._engine.release(self.order.request_id)
        return self._give_up("the request was submitted anew", now)
