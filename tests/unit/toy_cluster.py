"""A cluster of toys around a real stream table: instances that generate tokens from (seed, position), a
manager that places at random, and a network that loses, doubles, delays and reorders. One seed, virtual time,
no sockets.

Every token is checked the moment a client gets it; ``end_healed`` demands that everything finishes once the
faults stop.
"""

from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from random import Random

from llumnix.api.backend import FailKind, StreamCall
from llumnix.api.stream_state import Deliver, Effect, Fail
from llumnix.api.streams import StreamTable
from llumnix.core.config import FrontendConfig
from llumnix.core.effects import Send
from llumnix.core.epochs import next_hop
from llumnix.core.messages.control import (
    ClusterStatus,
    Fenced,
    InstanceState,
    InstanceStatus,
    NotPlaced,
    Place,
    Placed,
)
from llumnix.core.messages.serving import (
    Abort,
    FinishReason,
    Moved,
    Probe,
    ProbeReply,
    RejectCode,
    Rejected,
    RequestSpec,
    Submit,
    TokenBatch,
    TokenDelta,
)
from llumnix.core.sampling import SamplingParams

STEP_S = 0.1
FRONTEND, MANAGER = "frontend", "manager"


def token(seed: int, index: int) -> int:
    """What any instance generates at this index."""
    return (seed * 7919 + index * 104729) % 50000


@dataclass
class ToyInstance:
    """One process. Keeps what finished, to answer probes, and the epochs it gave up, so that a late copy of a
    Submit does not bring a request back to life."""

    instance_id: str
    incarnation: str
    full: bool = False
    held: dict[str, RequestSpec] = field(default_factory=dict)
    ended: dict[str, RequestSpec] = field(default_factory=dict)
    given_up: dict[str, int] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"{self.instance_id}/{self.incarnation}"

    def take(self, message: object) -> list[object]:
        if isinstance(message, Submit):
            return self._submit(message.spec)
        if isinstance(message, Abort):
            held = self.held.get(message.request_id)
            if held is not None and held.epoch <= message.epoch:
                self.give_up(message.request_id)
            return []
        assert isinstance(message, Probe)
        known = self.held | self.ended
        deltas = [self._since(known[one], index) for one, index in message.requests if one in known]
        unknown = tuple(one for one, _ in message.requests if one not in known)
        batch = [TokenBatch(self.instance_id, tuple(deltas))] if deltas else []
        return [ProbeReply(self.instance_id, unknown), *batch]

    def _submit(self, spec: RequestSpec) -> list[object]:
        held = self.held.get(spec.request_id)
        code = None
        last = self.given_up.get(spec.request_id, 0) if held is None else held.epoch
        if last >= spec.epoch:
            code = RejectCode.INVALID
        elif self.full:
            code = RejectCode.QUEUE_FULL
        if code is not None:
            return [Rejected(self.instance_id, spec.request_id, spec.epoch, code, f"{code}")]
        self.held[spec.request_id] = spec
        return []

    def give_up(self, request_id: str) -> RequestSpec:
        spec = self.held.pop(request_id)
        self.given_up[request_id] = spec.epoch
        return spec

    def _since(self, spec: RequestSpec, index: int) -> TokenDelta:
        ended = FinishReason.LENGTH if len(spec.output_tokens) >= spec.sampling.max_tokens else None
        return TokenDelta(spec.request_id, spec.epoch, index, spec.output_tokens[index:], ended)

    def step(self) -> list[object]:
        deltas = []
        for request_id, spec in list(self.held.items()):
            index = len(spec.output_tokens)
            spec = replace(spec, output_tokens=(*spec.output_tokens, token(spec.sampling.seed, index)))
            self.held[request_id] = spec
            if len(spec.output_tokens) >= spec.sampling.max_tokens:
                self.ended[request_id] = self.give_up(request_id)
            deltas.append(self._since(spec, index))
        return [TokenBatch(self.instance_id, tuple(deltas))] if deltas else []


class ToyCluster:
    """Drives one stream table. ``chaos`` 0 … 1 scales every fault."""

    def __init__(self, seed: int, chaos: float, instances: int = 3) -> None:
        self.rng = Random(seed)
        self.chaos = chaos
        self.now = 0.0
        self.table = StreamTable("f0", FRONTEND, MANAGER, FrontendConfig(requests_max=64))
        self.instances = {f"i{n}": ToyInstance(f"i{n}", "p0") for n in range(instances)}
        self.received: dict[str, list[int]] = {}
        self.calls: dict[str, StreamCall] = {}
        self.finished: set[str] = set()
        self.failed: dict[str, Fail] = {}
        self.aborted: set[str] = set()
        self.decoded_by: dict[tuple[str, int], str] = {}
        self.manager_up = True
        self._wire: list[tuple[float, int, str, object]] = []
        self._sent = 0
        self._births = 0

    def open(self, request_id: str, max_tokens: int) -> None:
        call = StreamCall(request_id, (1, 2, 3), SamplingParams(max_tokens=max_tokens, seed=len(self.calls)))
        self.calls[request_id] = call
        self.received[request_id] = []
        self._perform(self.table.open(call, self.now))

    def abort(self, request_id: str) -> None:
        self.aborted.add(request_id)
        self._perform(self.table.abort(request_id, self.now))

    def crash(self, instance_id: str) -> None:
        """The process dies; its successor starts at once. The frontend may or may not be told."""
        dead = self.instances[instance_id]
        self._births += 1
        self.instances[instance_id] = ToyInstance(instance_id, f"p{self._births}")
        self._send(FRONTEND, Fenced(instance_id, dead.incarnation))
        if self.rng.random() < 0.5:
            self._perform(self.table.peer_lost(dead.address, self.now))

    def migrate(self, request_id: str, source_id: str, target_id: str) -> None:
        """A committed migration, seen from outside."""
        spec = self.instances[source_id].give_up(request_id)
        self.instances[target_id].held[request_id] = replace(spec, epoch=next_hop(spec.epoch))
        self._send(FRONTEND, Moved(request_id, next_hop(spec.epoch), target_id))

    def advance(self) -> None:
        """One step of every instance, then all messages that are due."""
        for instance in self.instances.values():
            for message in instance.step():
                for delta in getattr(message, "deltas", ()):
                    owner = self.decoded_by.setdefault((delta.request_id, delta.epoch), instance.address)
                    assert owner == instance.address, f"{delta.request_id} decoded twice in {delta.epoch:#x}"
                self._send(FRONTEND, message)
        if self.manager_up and self.rng.random() < 0.1:
            self._send(FRONTEND, self._status())
        self.now += STEP_S
        while self._wire and self._wire[0][0] <= self.now:
            _, _, address, message = heappop(self._wire)
            self._arrive(address, message)
        if self.table.next_deadline() <= self.now:
            self._perform(self.table.tick(self.now))
        self.table.check()

    def faults(self) -> None:
        """Perhaps something bad, perhaps a migration."""
        rng = self.rng
        if rng.random() < 0.03 * self.chaos:
            self.crash(rng.choice(sorted(self.instances)))
        if rng.random() < 0.05 * self.chaos:
            self.manager_up = not self.manager_up
        if rng.random() < 0.05 * self.chaos:
            instance = self.instances[rng.choice(sorted(self.instances))]
            instance.full = not instance.full
        if rng.random() < 0.3:
            source_id, target_id = rng.sample(sorted(self.instances), 2)
            held = [
                one for one in self.instances[source_id].held if one not in self.instances[target_id].held
            ]
            if held:
                self.migrate(rng.choice(held), source_id, target_id)

    def end_healed(self, steps_max: int) -> None:
        """No more faults: everything still open must finish, completely and exactly."""
        self.chaos, self.manager_up = 0.0, True
        for instance in self.instances.values():
            instance.full = False
        for _ in range(steps_max):
            if not len(self.table):
                break
            self.advance()
        for request_id, call in self.calls.items():
            if request_id in self.finished:
                assert len(self.received[request_id]) == call.sampling.max_tokens, request_id
            else:
                assert request_id in self.aborted or request_id in self.failed, f"{request_id} never ended"

    def _status(self) -> ClusterStatus:
        entries = [
            InstanceStatus(one.instance_id, one.incarnation, one.address, InstanceState.SERVING, 10.0)
            for one in self.instances.values()
        ]
        return ClusterStatus(0, tuple(entries))

    def _send(self, address: str, message: object) -> None:
        copies = 1
        if self.rng.random() < 0.1 * self.chaos:
            copies = self.rng.choice((0, 2))
        for _ in range(copies):
            delay_s = 0.01 + self.rng.random() * (0.02 + 0.6 * self.chaos)
            self._sent += 1
            heappush(self._wire, (self.now + delay_s, self._sent, address, message))

    def _arrive(self, address: str, message: object) -> None:
        if address == FRONTEND:
            self._perform(self.table.handle(message, self.now))
        elif address == MANAGER:
            if self.manager_up and isinstance(message, Place):
                self._send(FRONTEND, self._place(message))
        else:
            for instance in self.instances.values():
                if instance.address == address:
                    for answer in instance.take(message):
                        self._send(FRONTEND, answer)

    def _place(self, message: Place) -> object:
        fit = [one for one in sorted(self.instances) if one not in message.exclude]
        if not fit or self.rng.random() < 0.1 * self.chaos:
            return NotPlaced(message.request_id, "no room", 0.5)
        chosen = self.instances[self.rng.choice(fit)]
        return Placed(message.request_id, chosen.instance_id, chosen.address)

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._send(effect.address, effect.message)
            elif isinstance(effect, Deliver):
                self._deliver(effect)
            else:
                assert effect.request_id not in self.finished and effect.request_id not in self.failed
                assert effect.kind is FailKind.OVERLOADED, effect
                assert not self.received[effect.request_id], "failed after its client had tokens"
                self.failed[effect.request_id] = effect

    def _deliver(self, effect: Deliver) -> None:
        request_id = effect.request_id
        assert request_id not in self.finished and request_id not in self.aborted
        received = self.received[request_id]
        assert effect.first_index == len(received), (
            f"{request_id}: {effect.first_index} after {len(received)}"
        )
        received += effect.tokens
        seed = self.calls[request_id].sampling.seed
        assert received == [token(seed, index) for index in range(len(received))]
        if effect.finish_reason is not None:
            self.finished.add(request_id)
