"""What pure cores return instead of doing it. Cores take an event and the time, change their own state and
return effects; the runtime or the simulator carries them out, in order."""

from typing import NamedTuple


class Send(NamedTuple):
    """Hand ``message`` to the process that takes messages at ``address``. It may be lost; cores must cope."""

    address: str
    message: object
