"""Messages between the two sides of one migration, and the wish for one. The protocol: migration/source.py,
target.py.

The target always reads from the source's pool, never the other way: a side that gives up can free its own
blocks at once, and no late write of a peer can ever land in them.
"""

from dataclasses import dataclass
from enum import StrEnum

from llumnix.core.messages.control import KvEndpoint, KvLayout
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.messages.serving import RequestSpec


class RefusalCode(StrEnum):
    NO_BLOCKS = "no_blocks"
    TOO_MANY = "too_many_migrations"
    DRAINING = "draining"
    LAYOUT = "layout_differs"
    TOO_LONG = "request_too_long"
    DUPLICATE = "request_already_here"
    WRONG_TARGET = "not_the_named_process"
    ADAPTER = "adapter_not_there"
    UNREADABLE = "kv_not_readable"


@dataclass(frozen=True, slots=True)
class Reserve:
    """Source to target: hold ``blocks`` for this request. ``spec`` is the request as of now, so that the
    commit only adds what was generated since. ``blocks`` 0: the request waits and brings no KV. It has left
    my queue with this message, and is yours at the next hop of its epoch. ``swapped``: it waits with its KV
    in my host memory, and ``kv_endpoint`` is that; it is in nobody's batch until it is yours.
    ``full_blocks`` are full by now; of these the target may have some already. ``commit``: nothing is to come
    before it, so here it is."""

    migration_id: str
    source_id: str
    source_incarnation: str
    source_address: str
    target_incarnation: str
    kv_endpoint: KvEndpoint
    kv_layout: KvLayout
    spec: RequestSpec
    blocks: int
    swapped: bool = False
    full_blocks: int = 0
    commit: "Commit | None" = None


@dataclass(frozen=True, slots=True)
class Reserved:
    """Target to source: the blocks are held and will be until the reservation goes ``expires_s`` without
    news. It leaves right before a step of the target; its steps take ``step_s`` (0.0: it has nothing to
    do). The first ``present_blocks`` of them hold the request's KV already, and need not be copied; the same
    number each time."""

    migration_id: str
    expires_s: float
    step_s: float = 0.0
    present_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """Target to source: no, nothing is held nor ever will be. Also the answer to a CopyStage that needs more
    room than there is, and to one or a Commit whose blocks cannot be read."""

    migration_id: str
    code: RefusalCode
    reason: str


@dataclass(frozen=True, slots=True)
class CopyStage:
    """Source to target: read these blocks of mine, the next ones of the request in order, each full and never
    to change. ``reserve_blocks`` is how many blocks in total the target should hold once this stage is
    done."""

    migration_id: str
    stage: int
    source_blocks: tuple[int, ...]
    reserve_blocks: int


@dataclass(frozen=True, slots=True)
class StageCopied:
    """Target to source: stage done, in ``copy_s`` seconds of reading. ``step_s`` as in Reserved."""

    migration_id: str
    stage: int
    copy_s: float
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Commit:
    """Source to target: the request left my batch; read these last blocks, then it is yours at ``epoch``.

    ``computed_tokens`` of prompt + output have their KV in the blocks copied. ``output_tokens`` are those
    from ``first_index`` on, to be put behind what Reserve's spec already had."""

    migration_id: str
    epoch: int
    source_blocks: tuple[int, ...]
    computed_tokens: int
    first_index: int
    output_tokens: tuple[int, ...]
    waited_s: float


@dataclass(frozen=True, slots=True)
class CommitSoon:
    """Source to target, at the start of the request's last step there: expect its commit in about ``in_s``
    seconds. A target that is between steps by then may wait for it a little, so that the request joins at
    once."""

    migration_id: str
    in_s: float


@dataclass(frozen=True, slots=True)
class Committed:
    """Target to source: the request is mine at ``epoch``. Sent again for every repeat of the question.
    Reading the commit's blocks took ``copy_s`` seconds."""

    migration_id: str
    epoch: int
    copy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Denied:
    """Target to source: I do not have it and never will under this migration id."""

    migration_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class QueryCommit:
    """Source to target, after a commit went unanswered: did you take it? The answer is Committed or Denied,
    and asking makes an undecided target decide (it denies unless it already adopted)."""

    migration_id: str
    source_address: str


@dataclass(frozen=True, slots=True)
class AbortMigration:
    """Source to target, before any commit: forget it, free what you held. Needs no answer: reservations
    expire."""

    migration_id: str
    reason: str


class MoveCause(StrEnum):
    """PREFILLED: a request's prefill has ended on an instance whose role is to prefill."""

    PREFILLED = "prefilled"


@dataclass(frozen=True, slots=True)
class MoveWanted:
    """Instance to manager: this request had better go elsewhere, now rather than at the next round. A wish
    that is lost costs time only."""

    instance_id: str
    incarnation: str
    cause: MoveCause
    candidate: MoveCandidate
