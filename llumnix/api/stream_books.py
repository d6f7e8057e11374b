"""What a frontend writes down of its requests: who owns each, at which epoch, by when to act; what it has
told whom. Every change of an owner or a deadline goes through here, so the counts per instance and the alarms
are always those of the streams. Used by the stream table only (streams.py, stream_placing.py).
"""

from collections import OrderedDict, deque
from math import inf

from llumnix.api.alarms import Alarms
from llumnix.api.backend import FailKind
from llumnix.api.directory import InstanceDirectory
from llumnix.api.stream_state import Effect, Fail, Phase, Stream, StreamStats
from llumnix.core.admin import MoveSeen
from llumnix.core.config import FrontendConfig
from llumnix.core.effects import Send
from llumnix.core.epochs import HOP_BITS, next_generation
from llumnix.core.messages.serving import Abort, Probe

MOVES_MAX = 1024  # migrations remembered as clients felt them
STOPPED_MIN = 1024  # instances lately told to stop a request that are remembered, at least


class StreamBooks:
    """The streams of one frontend, with what else must agree with them."""

    def __init__(self, frontend_id: str, address: str, manager_address: str, config: FrontendConfig) -> None:
        self.frontend_id = frontend_id
        self.manager_address = manager_address
        self.stats = StreamStats()
        self.moves: deque[MoveSeen] = deque(maxlen=MOVES_MAX)
        self._address = address
        self._config = config
        self._requick_s = config.silent_probe_s / 8
        self._streams: dict[str, Stream] = {}
        self._directory = InstanceDirectory()
        self._stopped: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._alarms = Alarms(self._requick_s)

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._streams

    def _move(self, stream: Stream, epoch: int, instance_id: str) -> None:
        stream.epoch = epoch
        self._own(stream, instance_id, self._directory.address(instance_id))

    def _own(self, stream: Stream, instance_id: str, address: str) -> None:
        if stream.owner_id:
            self._directory.hold(stream.owner_id, -1)
        if instance_id:
            self._directory.hold(instance_id, 1)
        stream.owner_id, stream.owner_address = instance_id, address
        stream.owner_incarnation = self._directory.incarnation(instance_id)
        stream.settle()

    def _leave(self, stream: Stream) -> None:
        self._own(stream, "", "")
        stream.epoch = next_generation(stream.epoch)

    def _moves_on(self, stream: Stream, epoch: int) -> bool:
        """Whether ``epoch`` is a later hop of the generation that is out."""
        same = epoch >> HOP_BITS == stream.epoch >> HOP_BITS
        return stream.phase is Phase.STREAMING and same and epoch > stream.epoch

    def _stop(self, request_id: str, epoch: int, instance_id: str, now: float) -> list[Effect]:
        """Tell an instance to drop the request at ``epoch`` or below, again only after a while."""
        address = self._directory.address(instance_id)
        key = (request_id, instance_id)
        if not address or now - self._stopped.get(key, -inf) < self._config.silent_probe_s:
            return []
        self._stopped[key] = now
        self._stopped.move_to_end(key)
        while len(self._stopped) > max(STOPPED_MIN, self._config.requests_max):
            self._stopped.popitem(last=False)
        return [Send(address, Abort(request_id, epoch))]

    def _probe_now(self, stream: Stream, now: float) -> list[Effect]:
        stream.asked, stream.probed_at = True, now
        self._set(stream, Phase.STREAMING, now + self._requick_s)
        probe = Probe(self._address, ((stream.call.request_id, len(stream.tokens)),))
        return [Send(stream.owner_address, probe)] if stream.owner_address else []

    def _set(self, stream: Stream, phase: Phase, deadline: float) -> None:
        stream.phase, stream.deadline = phase, deadline
        self._alarms.arm(stream)

    def _fail(self, stream: Stream, kind: FailKind, reason: str, retry_after_s: float) -> list[Effect]:
        self.stats.failed += 1
        self._forget(stream)
        return [Fail(stream.call.request_id, kind, reason, retry_after_s)]

    def _forget(self, stream: Stream) -> None:
        if stream.owner_id:
            self._directory.hold(stream.owner_id, -1)
            stream.owner_id = ""
        self._alarms.disarm(stream)
        del self._streams[stream.call.request_id]
