"""Tokens to text while they arrive: never half a character, never a piece of a stop string.

One ``TextStream`` per choice, fed by its route. What it has handed out adds up to the text of all tokens so
far, less the bytes of an unfinished character and what might still become a stop string. Pure; microseconds
per token.
"""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass

from llumnix.api.tokenizer import ByteTable

STOPS_MAX = 16
STOP_CHARS_MAX = 256

_Utf8 = getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that may be shown now. ``tokens_used`` of those fed count; ``stopped``: a stop string ended the
    text."""

    text: str
    tokens_used: int
    stopped: bool = False


class StopScanner:
    """Finds the earliest of some stop strings in text that comes in pieces."""

    def __init__(self, stops: Sequence[str], keep_stop: bool) -> None:
        self._stops = tuple(stops)
        self._keep_stop = keep_stop
        self._beginnings = frozenset(stop[:size] for stop in stops for size in range(1, len(stop)))
        self._longest = max(map(len, self._beginnings), default=0)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(what may be shown, whether a stop string is complete)."""
        text = self._held + piece
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda match: match[0])
            self._held = ""
            return text[: at + len(stop)] if self._keep_stop else text[:at], True
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[-size:] in self._beginnings:
                self._held = text[-size:]
                return text[:-size], False
        self._held = ""
        return text, False

    def release(self) -> str:
        """What was held back: nothing follows that could complete a stop string."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """The text of one generated sequence. Stop strings count only once ``min_tokens`` were generated."""

    def __init__(
        self,
        table: ByteTable,
        stops: Sequence[str] = (),
        *,
        keep_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._table = table
        self._skip_special = skip_special
        self._utf8 = _Utf8("replace")
        self._strip = table.strips_space
        self._scanner = StopScanner(stops, keep_stop) if stops else None
        self._unchecked = min_tokens

    def push(self, tokens: Sequence[int], last: bool = False) -> TextDelta:
        """Feed new tokens; ``last``: no more will come, so everything held back is handed out."""
        if self._scanner is None:
            return TextDelta(self._decode(tokens, last), len(tokens))
        shown = ""
        for used, token in enumerate(tokens, 1):
            piece = self._decode((token,), False)
            if self._unchecked > 0:
                self._unchecked -= 1
                shown += piece
                continue
            text, stopped = self._scanner.push(piece)
            shown += text
            if stopped:
                return TextDelta(shown, used, True)
        if last:
            text, stopped = self._scanner.push(self._decode((), True))
            shown += text if stopped else text + self._scanner.release()
            return TextDelta(shown, len(tokens), stopped)
        return TextDelta(shown, len(tokens))

    def _decode(self, tokens: Sequence[int], last: bool) -> str:
        text = self._utf8.decode(self._table.join(tokens, self._skip_special), last)
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
