"""The frontend's view of every request in flight: who may speak for it, and which tokens its client has.

Invariants: a client gets each index once, in order, from the newest epoch only. Every departure from an owner
takes a new generation, so a late word of the old owner can never be mistaken for the new one's. Each stream
has a deadline, so lost messages delay it and never strand it. Time is an argument; effects are carried out in
order by the caller (the runtime's frontend, or the simulator). Any message may be lost, late, doubled or
reordered.

The books it keeps: stream_books.py; how a request finds its instance: stream_placing.py.
"""

from collections.abc import Callable
from typing import Any

from llumnix.api.backend import FailKind, StreamCall
from llumnix.api.stream_placing import FULL_RETRY_AFTER_S, StreamPlacing
from llumnix.api.stream_state import Deliver, Effect, Fail, Phase, Stream, check_streams
from llumnix.core.config import FrontendConfig
from llumnix.core.effects import Send
from llumnix.core.epochs import HOP_MAX
from llumnix.core.errors import InvariantError, ProtocolError
from llumnix.core.messages.control import (
    ClusterStatus,
    Fenced,
    FrontendHello,
    HelloWanted,
    InstanceState,
    NotPlaced,
    Placed,
)
from llumnix.core.messages.serving import (
    FinishReason,
    Moved,
    Probe,
    ProbeReply,
    Rejected,
    TokenBatch,
    TokenDelta,
)

UNKNOWN_MAX = 2  # times an owner must deny a request: once may be a Moved still on its way
UNANSWERED_MAX = 4  # probes an owner may leave unanswered


class StreamTable(StreamPlacing):
    """All requests of one frontend. ``manager_address`` may be set anew when the manager moved."""

    def __init__(self, frontend_id: str, address: str, manager_address: str, config: FrontendConfig) -> None:
        super().__init__(frontend_id, address, manager_address, config)
        self._handlers: dict[type, Callable[[Any, float], list[Effect]]] = {
            TokenBatch: self._tokens,
            Placed: self._placed,
            NotPlaced: self._not_placed,
            Rejected: self._rejected,
            Moved: self._moved,
            ProbeReply: self._probe_reply,
            ClusterStatus: self._cluster_status,
            Fenced: self._fenced,
            HelloWanted: self._hello_wanted,
        }

    @property
    def ready(self) -> bool:
        """Whether some instance takes requests, as far as is known here."""
        return self._directory.any_serving

    def open(self, call: StreamCall, now: float) -> list[Effect]:
        """Begin a request: ask the manager for a place. A full table fails it at once."""
        if call.request_id in self._streams:
            raise InvariantError(f"request {call.request_id} is open already")
        if len(self._streams) >= self._config.requests_max:
            self.stats.failed += 1
            reason = f"{self._config.requests_max} requests are in flight already"
            return [Fail(call.request_id, FailKind.TOO_MANY, reason, FULL_RETRY_AFTER_S)]
        self.stats.opened += 1
        stream = self._streams[call.request_id] = Stream(call, opened_at=now, epoch=call.first_epoch)
        return self._ask_place(stream, now)

    def handle(self, message: object, now: float) -> list[Effect]:
        """Take one message of an instance or the manager. Those meant for others raise ProtocolError."""
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"no frontend takes {type(message).__name__}")
        return handler(message, now)

    def abort(self, request_id: str, now: float) -> list[Effect]:
        """The client is gone. Unknown ids are ignored: the stream may just have ended."""
        stream = self._streams.get(request_id)
        if stream is None:
            return []
        self.stats.aborted += 1
        effects = self._stop(request_id, stream.epoch | HOP_MAX, stream.owner_id, now)
        self._forget(stream)
        return effects

    def peer_lost(self, address: str, now: float) -> list[Effect]:
        """The connection to an instance broke: go on elsewhere. Its epoch is outdated, should it live."""
        self._directory.suspect(address)
        lost = [stream for stream in self._streams.values() if address and stream.owner_address == address]
        return [effect for stream in lost for effect in self._continue(stream, now)]

    def next_deadline(self) -> float:
        """When tick wants to be called; inf if nothing is open. May be early, never late."""
        return self._alarms.next_at()

    def tick(self, now: float) -> list[Effect]:
        """Act on every deadline that has passed. Probes to one instance travel as one message."""
        effects: list[Effect] = []
        probes: dict[str, list[tuple[str, int]]] = {}
        for stream in self._alarms.due(now):
            if stream.phase is Phase.STREAMING:
                effects += self._silent(stream, probes, now)
            elif stream.phase is Phase.BACKOFF:
                effects += self._ask_place(stream, now)
            else:
                effects += self._place_alone(stream, now)
        effects += [Send(to, Probe(self._address, tuple(pairs))) for to, pairs in probes.items()]
        return effects

    def check(self) -> None:
        """Raise InvariantError unless every promise about the table's own state holds."""
        check_streams(self._streams, self._directory.held, self.stats)

    # Tokens.
    def _tokens(self, batch: TokenBatch, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for delta in batch.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:
                if delta.finish_reason is None:
                    effects += self._stop(delta.request_id, delta.epoch | HOP_MAX, batch.instance_id, now)
            elif delta.epoch == stream.epoch and stream.owner_id:
                effects += self._accept(stream, delta, now)
            elif self._moves_on(stream, delta.epoch):
                self._move(stream, delta.epoch, batch.instance_id)
                effects += self._accept(stream, delta, now)
            else:
                self.stats.stale_deltas += 1
                effects += self._stop(delta.request_id, delta.epoch, batch.instance_id, now)
        return effects

    def _accept(self, stream: Stream, delta: TokenDelta, now: float) -> list[Effect]:
        stream.deadline = now + self._config.silent_probe_s
        known = len(stream.tokens)
        if delta.first_index > known:
            self.stats.gaps += 1
            return self._probe_now(stream, now) if now - stream.probed_at >= self._requick_s else []
        tokens, logprobs = delta.tokens, delta.logprobs
        overlap = known - delta.first_index
        if overlap:
            self.stats.trimmed_tokens += min(overlap, len(tokens))
            tokens, logprobs = tokens[overlap:], logprobs[overlap:]
        stream.settle()
        ends = delta.finish_reason is not None and overlap <= len(delta.tokens)
        if not tokens and not ends:
            return []
        moved = stream.feed(tokens, now)
        if moved is not None:
            self.moves.append(moved)
        self.stats.tokens += len(tokens)
        stream.begin()
        if ends:
            self.stats.finished += 1
            self._directory.kept.ended(stream.owner_id, stream.call, stream.tokens)
            self._forget(stream)
        return [Deliver(delta.request_id, known, tokens, logprobs, delta.finish_reason if ends else None)]

    # Owners.
    def _moved(self, message: Moved, now: float) -> list[Effect]:
        stream = self._streams.get(message.request_id)
        if stream is not None and self._moves_on(stream, message.epoch):
            self._move(stream, message.epoch, message.instance_id)
            stream.deadline = now + self._config.silent_probe_s
        return []

    def _continue(self, stream: Stream, now: float) -> list[Effect]:
        """Its owner died or forgot it: go on elsewhere, after the tokens delivered."""
        self.stats.continued += 1
        stream.must_continue = True
        if stream.troubled_at is None:
            stream.troubled_at = now
        stream.exclude = (stream.owner_id,)
        self._leave(stream)
        if len(stream.tokens) >= stream.call.sampling.max_tokens:  # only the word that it ended was lost
            self.stats.finished += 1
            self._forget(stream)
            return [Deliver(stream.call.request_id, len(stream.tokens), (), (), FinishReason.LENGTH)]
        return self._ask_place(stream, now)

    def _fenced(self, message: Fenced, now: float) -> list[Effect]:
        self._directory.forget_process(message.instance_id, message.incarnation)
        held = [stream for stream in self._streams.values() if stream.owner_id == message.instance_id]
        dead = [stream for stream in held if stream.owner_incarnation in ("", message.incarnation)]
        return [effect for stream in dead for effect in self._continue(stream, now)]

    def _cluster_status(self, status: ClusterStatus, now: float) -> list[Effect]:
        self._directory.update(status)
        listed = {entry.instance_id: entry for entry in status.instances}
        effects: list[Effect] = []
        for stream in list(self._streams.values()):
            entry = listed.get(stream.owner_id)
            if entry is None:
                continue  # a manager that has just restarted lists nobody: no proof of death
            replaced = stream.owner_incarnation not in ("", entry.incarnation)
            if replaced or entry.state is InstanceState.DOWN:
                effects += self._continue(stream, now)
            else:
                stream.owner_incarnation, stream.owner_address = entry.incarnation, entry.address
        return effects

    def _hello_wanted(self, message: HelloWanted, now: float) -> list[Effect]:
        return [Send(self.manager_address, FrontendHello(self.frontend_id, self._address))]

    # Silence.
    def _silent(self, stream: Stream, probes: dict[str, list[tuple[str, int]]], now: float) -> list[Effect]:
        if stream.asked:
            if self._directory.answered_at(stream.owner_id) >= stream.probed_at:  # and did not say unknown
                stream.settle()
            else:
                stream.unanswered += 1
        if stream.unanswered >= UNANSWERED_MAX and self._directory.freest((stream.owner_id,)) is not None:
            return self._give_up_owner(stream, now)
        stream.asked, stream.probed_at = True, now
        self._set(stream, Phase.STREAMING, now + self._config.silent_probe_s)
        if stream.owner_address:
            probes.setdefault(stream.owner_address, []).append((stream.call.request_id, len(stream.tokens)))
        return []

    def _probe_reply(self, reply: ProbeReply, now: float) -> list[Effect]:
        self._directory.answered(reply.instance_id, now)
        effects: list[Effect] = []
        for request_id in reply.unknown:
            stream = self._streams.get(request_id)
            if stream is None or stream.owner_id != reply.instance_id or not stream.asked:
                continue
            stream.asked = False
            stream.unknown += 1
            if stream.invalid_reason:
                effects += self._fail(stream, FailKind.INVALID, stream.invalid_reason, 0.0)
            elif stream.unknown >= UNKNOWN_MAX:
                effects += self._give_up_owner(stream, now)
            else:
                self._set(stream, Phase.STREAMING, now + self._requick_s)
        return effects

    def _give_up_owner(self, stream: Stream, now: float) -> list[Effect]:
        """It lives, yet is of no use: what it has left of the request is to end, in whichever hop."""
        epoch = stream.epoch | HOP_MAX
        return self._stop(stream.call.request_id, epoch, stream.owner_id, now) + self._continue(stream, now)
