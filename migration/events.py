"""What happens to a migration besides messages, and what it asks for besides sending them.

Events are made by the instance's agent (instance/agent.py) and handed to the two state machines; effects come
back and are carried out by the runtime or the simulator.
"""

from dataclasses import dataclass

from llumnix.core.effects import Send
from llumnix.core.errors import TransportError
from llumnix.core.messages.control import KvEndpoint
from llumnix.migration.transports.base import ReadStats


@dataclass(frozen=True, slots=True)
class StepEnded:
    """The engine of this side has done a step."""


@dataclass(frozen=True, slots=True)
class ClientAbort:
    """The request's client wants it stopped, if it is held at ``epoch`` or below."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Superseded:
    """A newer generation of the request arrives at the source; what is being moved counts no more."""


@dataclass(frozen=True, slots=True)
class PeerFenced:
    """The process on the other side has ended for certain."""


@dataclass(frozen=True, slots=True)
class Timeout:
    """The machine's ``deadline`` has passed."""


@dataclass(frozen=True, slots=True)
class ReadEnded:
    """The read begun for ``stage`` has returned; nothing writes to the reservation's blocks any more."""

    stage: int
    outcome: ReadStats | TransportError


@dataclass(frozen=True, slots=True)
class StartRead:
    """Copy ``source_blocks`` of the pool at ``endpoint`` into ``target_blocks`` of our own, in the background
    and report to ``Agent.read_ended``. ``final``: the last blocks of a request that is about to join, which a
    step waits for. ``rests``: the request computes elsewhere meanwhile, so the copy may take its time."""

    migration_id: str
    stage: int
    endpoint: KvEndpoint
    source_blocks: tuple[int, ...]
    target_blocks: tuple[int, ...]
    final: bool
    rests: bool = True


@dataclass(frozen=True, slots=True)
class CloseReader:
    """Nothing reads from this pool any more, or its process has ended: close what was opened for it."""

    pool_name: str


Effect = Send | StartRead | CloseReader
