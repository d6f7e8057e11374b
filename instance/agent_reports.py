"""When an instance reports its load to the manager, and what it says.

Reports go out when there is news, at most every ``interval_s``, and every HEARTBEAT_S in any case, so that
silence means trouble. News is who is here, waits, runs or moves; only that a request has been submitted,
which the manager has placed and counts, may wait ``interval_s`` for what the next step makes of it. That the
batch got its next tokens is progress: a report per step of every instance would leave the manager no time for
anything else. By itself it is told when it may have used up PROGRESS_SHARE of the steps that free blocks last
for, as that is what freeness is compared in, and at most every PROGRESS_S. Each carries a sequence number one
above the last. Used by the agent (agent.py) alone.
"""

from math import inf

from llumnix.core.effects import Send
from llumnix.core.messages.control import InstanceHello, InstanceRole
from llumnix.core.messages.load import LoadReport
from llumnix.instance.engine import Engine, EngineLoad

HEARTBEAT_S = 1.0
PROGRESS_S = 0.5
PROGRESS_SHARE = 1 / 16


class LoadReporter:
    """Keeps the pace of reports. ``changed`` marks that the next one has news, ``progressed`` progress.
    ``settings_revision`` is that of the settings the manager last told, ``fault`` why they cannot hold
    here."""

    def __init__(self, me: InstanceHello, engine: Engine, interval_s: float, manager_address: str) -> None:
        self._me = me
        self._engine = engine
        self._interval_s = interval_s
        self._manager_address = manager_address
        self._sequence = 0
        self._last_at = self._news_at = self._progress_at = self._heartbeat_at = -inf
        self._submission_at = inf
        self._changed = True
        self._progressed = False
        self._accepted: list[str] = []
        self.settings_revision = 0
        self.fault = ""

    def changed(self) -> None:
        """Something happened that the manager should know soon."""
        self._changed = True

    def progressed(self) -> None:
        """The batch has got on."""
        self._progressed = True

    def accepted(self, request_id: str) -> None:
        """A request was taken; the next report names it."""
        self._accepted.append(request_id)

    def submitted(self, now: float) -> None:
        """A frontend has brought a request."""
        self._submission_at = min(self._submission_at, max(self._last_at, now) + self._interval_s)

    def next_deadline(self) -> float:
        """When the next report goes out if nothing happens by then."""
        if self._changed:
            return self._news_at
        return min(self._progress_at if self._progressed else self._heartbeat_at, self._submission_at)

    def due_if_progressed(self) -> float:
        """When the next report goes out if the batch gets on and nothing else happens by then."""
        return self._news_at if self._changed else min(self._progress_at, self._submission_at)

    def due(self, now: float) -> bool:
        """Whether a report should go out now."""
        return now >= self.next_deadline()

    def report(
        self, now: float, *, migrating_in: int, migrating_out: int, draining: bool, role: InstanceRole
    ) -> Send:
        """The report, due or not."""
        load = self._engine.load()
        self._sequence += 1
        self._changed = self._progressed = False
        self._last_at, self._submission_at = now, inf
        self._news_at, self._heartbeat_at = now + self._interval_s, now + HEARTBEAT_S
        self._progress_at = now + max(self._interval_s, self._progress_due_s(load))
        accepted, self._accepted = tuple(self._accepted), []
        report = LoadReport(  # by position, as the load itself
            self._me.instance_id,
            self._me.incarnation,
            self._sequence,
            load.capacity_blocks,
            load.used_blocks,
            load.reserved_blocks,
            load.head_blocks,
            load.waiting_blocks,
            load.running,
            load.waiting,
            migrating_in,
            migrating_out,
            draining,
            load.execution_priorities,
            load.candidates,
            accepted,
            load.step_s,
            load.tokens_total,
            load.preemptions_total,
            load.finished_total,
            self._me.address,
            self.fault or load.policy_fault,
            load.tenants,
            self.settings_revision,
            role,
            load.swap,
            load.shortage,
            load.waiting_urgent,
            load.adapters,
            load.kept_tokens_max,
            load.head_missing_blocks,
            load.head_priority,
            load.head_arrived_at,
            max(0.0, now - load.head_arrived_at) if load.waiting else 0.0,
        )
        return Send(self._manager_address, report)

    def _progress_due_s(self, load: EngineLoad) -> float:
        """How long progress alone may go untold under this load."""
        if not load.running:
            return HEARTBEAT_S
        free = load.capacity_blocks - load.used_blocks - load.reserved_blocks - load.waiting_blocks
        lasts_s = free / load.running * self._engine.block_size * load.step_s
        return min(HEARTBEAT_S, max(PROGRESS_S, PROGRESS_SHARE * lasts_s))
