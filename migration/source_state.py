"""What both phases of a source's migration go by: its states, its books, and the open exchange with the
target. The phases: source.py, in which the source decides alone, and source_commit.py, after.
"""

from enum import StrEnum

from llumnix.core.config import MigrationConfig
from llumnix.core.effects import Send
from llumnix.core.epochs import next_hop
from llumnix.core.messages.control import InstanceHello, MigrateOrder, MigrationOutcome
from llumnix.core.messages.migration import AbortMigration, Commit, Denied, RefusalCode, Refused, Reserve
from llumnix.core.messages.serving import Moved, RequestSpec
from llumnix.migration.alignment import Rhythm
from llumnix.migration.copying import WITHOUT_KV, Copying
from llumnix.migration.engine_sides import GivingEngine, Movable
from llumnix.migration.pace import CopySpeeds, Pace
from llumnix.migration.story import Story
from llumnix.migration.tally import Tally


class SourceState(StrEnum):
    """See source.py for what each means."""

    RESERVING = "reserving"
    COPYING = "copying"
    READY = "ready"
    COMMITTING = "committing"
    COMMIT_UNKNOWN = "commit_unknown"
    COMMITTED = "committed"
    RESUMED = "resumed"
    ABORTED = "aborted"
    REFUSED = "refused"


S = SourceState
ENDED = (S.COMMITTED, S.RESUMED, S.ABORTED, S.REFUSED)
UNDECIDED = (S.COMMITTING, S.COMMIT_UNKNOWN)


class OpenMigration:
    """One migration out of this instance, apart from what its events do. ``spec`` is the request as the
    target first heard of it."""

    def __init__(
        self,
        order: MigrateOrder,
        me: InstanceHello,
        *,
        engine: GivingEngine,
        config: MigrationConfig,
        pace: Pace,
        speeds: CopySpeeds,
        manager_address: str,
    ) -> None:
        self.order = order
        self.migration_id = order.migration_id
        """Of the exchange with the target; the manager knows the order's."""
        self.state = SourceState.RESERVING
        self.deadline: float | None = None
        self.rhythm: Rhythm | None = None
        """The target's steps, as last heard; set by whoever knows when the message arrived."""
        self.spec: RequestSpec
        self._me, self._engine, self._config = me, engine, config
        self._manager_address = manager_address
        self._story = Story()
        self._copying: Copying
        self._tally = Tally(0.0)
        self._pace, self._speeds = pace, speeds

    @property
    def ended(self) -> bool:
        """Whether nothing more can happen, so that the agent may forget this migration."""
        return self.state in ENDED

    @property
    def undecided(self) -> bool:
        """Whether a commit is on its way: the request is in no batch here, and may be in one elsewhere."""
        return self.state in UNDECIDED

    @property
    def moved(self) -> Moved:
        """What the request's frontend is told once the target has it."""
        return Moved(self.order.request_id, next_hop(self.spec.epoch), self.order.target_id)

    def story(self) -> str:
        """What this migration has been through, for errors and logs."""
        order = self.order
        head = f"migration {order.migration_id} of {order.request_id} to {order.target_id}, {self.state}"
        return f"{head} after {self._tally.stages} stages: {self._story}"

    def _reserve(self, movable: Movable, now: float) -> list[Send]:
        """Open an exchange with the target. For a request that goes without KV this is its commit, for one
        whose KV is all in host memory and quickly over it brings the commit along."""
        copying, commit = self._copying, None
        if copying.endpoint is None:
            self._take_out(now)
        elif copying.at_once(movable, now):
            commit = self._commit(movable, now)
        reserve = Reserve(
            migration_id=self.migration_id,
            source_id=self._me.instance_id,
            source_incarnation=self._me.incarnation,
            source_address=self._me.address,
            target_incarnation=self.order.target_incarnation,
            kv_endpoint=copying.endpoint or self._me.kv_endpoint,
            kv_layout=self._me.kv_layout,
            spec=self.spec,
            blocks=0 if copying.endpoint is None else copying.blocks_wanted(movable, self.spec),
            swapped=copying.swapped,
            full_blocks=copying.full_blocks,
            commit=commit,
        )
        self._wait(now)
        return [self._send(reserve)]

    def _commit(self, movable: Movable, now: float) -> Commit:
        """Take the request out for the target to have, with what it has not read yet."""
        current = self._engine.spec_of(self.order.request_id, now)
        self._take_out(now)
        last = self._copying.last_blocks(movable)
        self._tally.blocks += len(last)
        first_index = len(self.spec.output_tokens)
        fresh, epoch = current.output_tokens[first_index:], next_hop(self.spec.epoch)
        where = (last, movable.computed_tokens)
        return Commit(self.migration_id, epoch, *where, first_index, fresh, current.waited_s)

    def _refused(self, event: Refused, now: float) -> list[Send]:
        """The request is in queue or batch here. Swapped-out, it may still be queued at the target, without
        KV, unless it has begun to run here meanwhile."""
        movable = self._engine.movable(self.order.request_id)
        if movable is None or not self._copying.leaves_kv(event, movable):
            return self._target_said_no(event, now)
        self.migration_id += WITHOUT_KV
        self._tally.start_again()
        return self._reserve(movable, now)

    def _target_said_no(self, event: Refused | Denied, now: float) -> list[Send]:
        if isinstance(event, Denied):
            return self._end(S.ABORTED, event.reason, now)
        failed = event.code is RefusalCode.UNREADABLE
        return self._end(S.ABORTED if failed else S.REFUSED, f"{event.code}: {event.reason}", now)

    def _give_up(self, reason: str, now: float) -> list[Send]:
        abort = AbortMigration(self.migration_id, reason)
        return [self._send(abort), *self._end(S.ABORTED, reason, now)]

    def _ignore(self, event: object, now: float) -> list[Send]:
        """A repeat, or an answer overtaken by a later one."""
        return []

    def _take_out(self, now: float) -> None:
        """From now on the target decides."""
        self._engine.take_out(self.order.request_id)
        self.state, self._tally.taken_out_at = S.COMMITTING, now

    def _wait(self, now: float) -> None:
        self.deadline = now + self._config.answer_timeout_s

    def _send(self, message: object) -> Send:
        return Send(self.order.target_address, message)

    def _end(self, state: SourceState, reason: str, now: float) -> list[Send]:
        """Tell the manager how it ended."""
        self.state, self.deadline = state, None
        ended = self._tally.ended(self.order, self._me, MigrationOutcome(state.value), reason, now)
        return [Send(self._manager_address, ended)]
