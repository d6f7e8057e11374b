"""The outputs of lately finished requests, kept a while for frontends that missed the last delta.

Bounded by count and by tokens, where each log probability counts as one more; the oldest go first. Called by
the engine core.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from llumnix.core.messages.serving import FinishReason, TokenDelta, TokenLogprob
from llumnix.instance.request import Request

REQUESTS_MAX = 1024
TOKENS_MAX = 65_536


@dataclass(frozen=True, slots=True)
class FinishedOutput:
    """What a request had generated, in which epoch, and why it ended."""

    epoch: int
    tokens: "array[int]"
    reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def size(self) -> int:
        """What it counts for: its tokens, and every log probability kept with them."""
        return len(self.tokens) + sum(1 + len(logprob.top) for logprob in self.logprobs)

    def since(self, request_id: str, index: int) -> TokenDelta:
        """All from output ``index`` on, with the reason of its end."""
        tokens = tuple(self.tokens[index:])
        logprobs = last_logprobs(self.logprobs, len(tokens))
        return TokenDelta(request_id, self.epoch, index, tokens, self.reason, logprobs)


def last_logprobs(known: Sequence[TokenLogprob], count: int) -> tuple[TokenLogprob, ...]:
    """Those of the last ``count`` tokens; none at all unless all are known."""
    return tuple(known[len(known) - count :]) if 0 < count <= len(known) else ()


class FinishedOutputs:
    """See the module."""

    def __init__(self) -> None:
        self._outputs: dict[str, FinishedOutput] = {}
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._outputs)

    def add(self, request: Request, reason: FinishReason) -> None:
        """Remember a request that has just ended."""
        self.drop(request.request_id)
        tokens = array("i", request.tokens[request.prompt_len :])
        output = FinishedOutput(request.epoch, tokens, reason, tuple(request.logprobs))
        self._outputs[request.request_id] = output
        self._tokens += output.size
        while len(self._outputs) > REQUESTS_MAX or self._tokens > TOKENS_MAX:
            self.drop(next(iter(self._outputs)))

    def get(self, request_id: str) -> FinishedOutput | None:
        """The output of a request that is still remembered."""
        return self._outputs.get(request_id)

    def drop(self, request_id: str) -> None:
        """Forget a request; an unknown one is fine."""
        output = self._outputs.pop(request_id, None)
        if output is not None:
            self._tokens -= output.size
