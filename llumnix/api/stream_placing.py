"""How a request of a frontend finds an instance: the manager is asked, or, where it does not answer, the last
view decides; refusals are taken elsewhere, within bounds. A part of the stream table (streams.py), whose
invariants hold here too.
"""

from llumnix.api.backend import FailKind
from llumnix.api.stream_books import StreamBooks
from llumnix.api.stream_state import Effect, Phase, Stream
from llumnix.core.effects import Send
from llumnix.core.messages.control import NotPlaced, Placed
from llumnix.core.messages.serving import RejectCode, Rejected, Submit

CONTINUE_MAX_S = 300.0  # a request whose owner died is tried this long before its client sees an error
PLACE_TRIES_MAX = 3  # unanswered questions for a place before a fresh request is refused
REJECTIONS_MAX = 5  # instances that may refuse a fresh request in a row
FULL_RETRY_AFTER_S = 1.0


class StreamPlacing(StreamBooks):
    """Phases PLACING and BACKOFF, and the step into STREAMING."""

    def _ask_place(self, stream: Stream, now: float) -> list[Effect]:
        self._set(stream, Phase.PLACING, now + self._config.place_timeout_s)
        stream.tries += 1
        return [Send(self.manager_address, stream.place(self._address, self._directory.kept))]

    def _placed(self, message: Placed, now: float) -> list[Effect]:
        stream = self._streams.get(message.request_id)
        if stream is None or stream.phase is not Phase.PLACING or message.instance_id in stream.exclude:
            return []  # an answer to an earlier question
        return self._submit(stream, message.instance_id, message.address, now)

    def _submit(self, stream: Stream, instance_id: str, address: str, now: float) -> list[Effect]:
        self._directory.learn_address(instance_id, address)
        self._own(stream, instance_id, address)
        self._set(stream, Phase.STREAMING, now + self._config.silent_probe_s)
        return [Send(address, Submit(stream.spec(self._address, now)))]

    def _not_placed(self, message: NotPlaced, now: float) -> list[Effect]:
        stream = self._streams.get(message.request_id)
        if stream is None or stream.phase is not Phase.PLACING:
            return []
        reason = f"{message.reason}; last refusal: {stream.refusal}" if stream.refusal else message.reason
        return self._nowhere(stream, reason, message.retry_after_s, now)

    def _nowhere(self, stream: Stream, reason: str, retry_after_s: float, now: float) -> list[Effect]:
        """No instance takes it now: an answer for a fresh request, a delay for one that had begun."""
        if not stream.must_continue:
            kind = FailKind.OVERLOADED if retry_after_s else FailKind.INVALID  # 0: trying again is no use
            return self._fail(stream, kind, reason, retry_after_s)
        if stream.troubled_at is None:
            stream.troubled_at = now
        if now - stream.troubled_at > CONTINUE_MAX_S:
            return self._fail(stream, FailKind.LOST, f"could not be continued: {reason}", retry_after_s)
        stream.exclude = ()
        self._set(stream, Phase.BACKOFF, now + stream.retry_s(retry_after_s))
        return []

    def _place_alone(self, stream: Stream, now: float) -> list[Effect]:
        chosen = self._directory.freest(stream.exclude)
        if chosen is not None:
            self.stats.placed_alone += 1
            return self._submit(stream, *chosen, now)
        reason = "the manager does not answer and no instance is known to serve"
        if stream.must_continue or stream.tries >= PLACE_TRIES_MAX:
            return self._nowhere(stream, reason, FULL_RETRY_AFTER_S, now)
        return self._ask_place(stream, now)

    def _rejected(self, message: Rejected, now: float) -> list[Effect]:
        stream = self._streams.get(message.request_id)
        if stream is None or stream.epoch != message.epoch or stream.owner_id != message.instance_id:
            return []
        self.stats.rejected += 1
        stream.refusal = message.reason
        if message.code is RejectCode.INVALID:
            # A doubled Submit is refused as well, while its first copy runs: ask before failing the client.
            stream.invalid_reason = message.reason
            return self._probe_now(stream, now)
        if not stream.must_continue and stream.tries >= REJECTIONS_MAX:
            return self._fail(stream, FailKind.OVERLOADED, message.reason, FULL_RETRY_AFTER_S)
        stream.exclude = (*stream.exclude, message.instance_id)
        self._leave(stream)
        if stream.tries == 1:
            return self._ask_place(stream, now)
        if stream.must_continue:
            return self._nowhere(stream, message.reason, 0.0, now)
        self._set(stream, Phase.BACKOFF, now + stream.retry_s())
        return []
