"""The role an instance works in, and its word to the manager when a request's prefill has ended.

Only an instance whose role is to prefill speaks: once for each request that began here, after the step that
made its first token; for all that decode here when it takes this role or a new manager asks who it is. Used
by the agent alone.
"""

from collections.abc import Iterable

from llumnix.core.effects import Send
from llumnix.core.messages.control import InstanceHello, InstanceRole, RequestStatus
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.messages.migration import MoveCause, MoveWanted
from llumnix.core.messages.serving import TokenDelta
from llumnix.instance.agent_memory import Latest
from llumnix.instance.engine import Engine

FRESH_MAX = 8192


class AgentRole:
    """``role`` is the one in force. ``fresh`` requests have not made a token here yet."""

    def __init__(self, me: InstanceHello, engine: Engine, manager_address: str) -> None:
        self.role = me.role
        self._me = me
        self._engine = engine
        self._manager_address = manager_address
        self._fresh: Latest[str, None] = Latest(FRESH_MAX)

    def become(self, role: InstanceRole, now: float) -> list[Send]:
        """Work in this role from now on."""
        self.role = role
        return self.all_decoding(now)

    def arrived(self, request_id: str) -> None:
        """A request has come that has to be prefilled."""
        if self.role is InstanceRole.PREFILL:
            self._fresh.remember(request_id, None)

    def joined(self, request_id: str) -> None:
        """A request has come that already decodes. It may have left from here before its first token."""
        self._fresh.pop(request_id, None)

    def step_ended(self, deltas: Iterable[Iterable[TokenDelta]], now: float) -> list[Send]:
        """A step has made these tokens."""
        if self.role is not InstanceRole.PREFILL or not len(self._fresh):
            return []
        begun = [
            delta for batch in deltas for delta in batch if delta.request_id in self._fresh and delta.tokens
        ]
        for delta in begun:
            self._fresh.pop(delta.request_id, None)
        return self._wanted((delta.request_id for delta in begun if delta.finish_reason is None), now)

    def all_decoding(self, now: float) -> list[Send]:
        """As if the prefill of every request in the batch had just ended."""
        if self.role is not InstanceRole.PREFILL:
            return []
        rows = self._engine.rows(self._me.instance_id, now)
        decoding = [row for row in rows if row.status is RequestStatus.RUNNING and row.output_tokens]
        return self._wanted((row.request_id for row in decoding), now)

    def _wanted(self, request_ids: Iterable[str], now: float) -> list[Send]:
        sends = []
        for request_id in request_ids:
            state = self._engine.movable(request_id)
            if state is None or state.waiting:
                continue
            spec = self._engine.spec_of(request_id, now)
            candidate = MoveCandidate(
                request_id,
                -(-state.computed_tokens // self._engine.block_size),
                spec.execution_priority,
                waiting=False,
                tokens=state.known_tokens,
                adapter=spec.adapter,
            )
            wanted = MoveWanted(self._me.instance_id, self._me.incarnation, MoveCause.PREFILLED, candidate)
            sends.append(Send(self._manager_address, wanted))
        return sends
