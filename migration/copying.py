"""What of a request's KV has been copied, what is next, and from where: the source's books of one migration,
apart from its protocol. Kept by migration/source.py.

The KV lies in the device pool while the request runs, in the host pool while it is swapped out, and what was
copied counts only while ``kv_version`` stays as it was at the beginning. What the target had before counts as
copied.
"""

from llumnix.core.messages.control import InstanceHello, KvEndpoint
from llumnix.core.messages.migration import Committed, RefusalCode, Refused, StageCopied
from llumnix.core.messages.serving import RequestSpec
from llumnix.migration.engine_sides import Movable
from llumnix.migration.pace import CopySpeeds

KV_STAYS = (RefusalCode.NO_BLOCKS, RefusalCode.LAYOUT, RefusalCode.UNREADABLE)
"""Refusals of the KV rather than of its request."""

AT_ONCE_S = 0.02
"""KV in host memory that takes no longer to read goes with the commit; a step of the target waits for it."""

WITHOUT_KV = "/without-kv"
"""Follows the id of a migration that goes on without KV, as a second exchange with its target."""


class Copying:
    """``endpoint`` is where the target is to read; None: the request goes without KV. ``swapped``: that is
    host memory. ``under_way`` blocks belong to a stage that has not ended."""

    def __init__(
        self, me: InstanceHello, target: str, speeds: CopySpeeds, movable: Movable, now: float
    ) -> None:
        self.under_way = self.copied = self._last = 0
        self._layout = me.kv_layout
        self._target, self._speeds = target, speeds
        self._kv_version, self._known_tokens = movable.kv_version, movable.known_tokens
        self.endpoint: KvEndpoint | None = None if movable.waiting else me.kv_endpoint
        self.swapped = movable.swapped and me.host_endpoint is not None
        self._left_because = ""
        self._full_blocks = movable.computed_tokens // self._layout.block_size
        if movable.swapped:
            copy_s = speeds.copy_s(target, len(movable.blocks) * self._layout.block_bytes, now)
            self.swapped = self.swapped and not 0 < movable.recompute_s < copy_s
            self.endpoint = me.host_endpoint if self.swapped else None
            if not self.swapped:
                faster = me.host_endpoint is not None
                self._left_because = "computing it again is faster" if faster else "peers cannot read it"

    def leaves_kv(self, refused: Refused, movable: Movable) -> bool:
        """Whether the request goes without KV after all, since the target has no place for what of it lies in
        host memory or cannot read it; from now on, if so."""
        leaves = self.swapped and refused.code in KV_STAYS and not self.lost(movable)
        if leaves:
            self.endpoint, self.swapped = None, False
            self._left_because = f"{refused.code}: {refused.reason}"
        return leaves

    def explained(self, reason: str) -> str:
        """Why it moved, and why without the KV that it had, if so."""
        return f"{reason}, without its KV ({self._left_because})" if self._left_because else reason

    def lost(self, movable: Movable | None) -> str:
        """Why what was copied does not count any more, or no more can be; empty: it does, and can."""
        if movable is None:
            return "it was swapped in or has ended" if self.swapped else "the request has ended"
        if movable.kv_version == self._kv_version:
            return movable.hindrance
        return "its KV in host memory is gone" if self.swapped else "the request was preempted"

    @property
    def full_blocks(self) -> int:
        """Full blocks at the beginning: what the target may have of its own. It is not asked about those in
        host memory, to save the time of the answer."""
        return 0 if self.endpoint is None or self.swapped else self._full_blocks

    def skip(self, present: int) -> bool:
        """The target has the first ``present`` blocks. False: there are not so many."""
        if not 0 <= present <= self.full_blocks:
            return False
        self.copied = present
        return True

    def fresh(self, movable: Movable) -> int:
        """Full blocks that have not been copied."""
        return movable.full_blocks - self.copied

    def begin_stage(self, movable: Movable) -> tuple[int, ...]:
        """The blocks of the next stage: all fresh ones."""
        self.under_way = self.fresh(movable)
        self._known_tokens = movable.known_tokens
        return self._blocks(movable, self.copied + self.under_way)

    def stage_ended(self, done: StageCopied, now: float) -> None:
        """The last stage begun has been copied."""
        if self.swapped and self.under_way:
            kv_bytes = self.under_way * self._layout.block_bytes
            self._speeds.note(self._target, kv_bytes, done.copy_s, now)
        self.copied += self.under_way
        self.under_way = 0

    def last_blocks(self, movable: Movable) -> tuple[int, ...]:
        """What the commit has to bring."""
        last = self._blocks(movable, -(-movable.computed_tokens // self._layout.block_size))
        self._last = len(last)
        return last

    def _blocks(self, movable: Movable, end: int) -> tuple[int, ...]:
        """Those that have not been copied, up to the request's block ``end``."""
        return movable.blocks[self.copied - movable.first_block : end - movable.first_block]

    def at_once(self, movable: Movable, now: float) -> bool:
        """Whether all there is can go with the commit: it lies in host memory, whole, and the target is known
        to read it before a step is held up for long."""
        copy_s = self._speeds.copy_s(self._target, len(movable.blocks) * self._layout.block_bytes, now)
        return self.swapped and not movable.lagging and 0 < copy_s <= AT_ONCE_S

    def committed(self, done: Committed, now: float) -> None:
        """The target has read the last blocks too, in a time that says how fast it reads if they were all."""
        if self.swapped and self.copied == 0:
            self._speeds.note(self._target, self._last * self._layout.block_bytes, done.copy_s, now)

    def blocks_wanted(self, movable: Movable, spec: RequestSpec) -> int:
        """Blocks for what exists and what the next stage will add, judged by the one before."""
        block_size = self._layout.block_size
        growth = 0 if self.swapped else max(block_size, movable.known_tokens - self._known_tokens)
        longest = len(spec.prompt_tokens) + spec.sampling.max_tokens
        tokens = min(movable.known_tokens + growth, longest)
        return max(len(movable.blocks), -(-tokens // block_size))
