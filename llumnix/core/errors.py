"""The one error tree. Every error of ours is one of four kinds, so that callers know whose fault it is.

An expected refusal (no room, queue full) is a return value with a reason, never one of these.
"""


class LlumnixError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigurationError(LlumnixError):
    """The user asked for something impossible or misspelt; the text names the setting and what is allowed."""


class ProtocolError(LlumnixError):
    """The peer is wrong: an undecodable message, an unknown tag, a field out of range, an illegal
    transition."""


class InvariantError(LlumnixError):
    """We are wrong: a rule this code promises to keep does not hold. Always a bug."""


class TransportError(LlumnixError):
    """Bytes did not arrive: the peer is gone, a mapping could not be opened, a read was cut short."""
