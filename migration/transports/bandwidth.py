"""The cap on migration bandwidth: a token bucket shared by all reads of one instance.

Clock and sleep are arguments, so that tests need neither. Called by readers, from their copy threads.
"""

import threading
from collections.abc import Callable

BURST_S = 0.05


class TokenBucket:
    """Lets ``bytes_per_s`` through on average, BURST_S worth of it at once; 0 is no limit. An urgent read
    never waits, since a request is in nobody's batch until it is done, but it counts: later reads pay for
    it."""

    def __init__(
        self, bytes_per_s: float, *, clock: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self._rate = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._tokens = bytes_per_s * BURST_S
        self._filled_at = clock()

    def chunk_bytes(self, most: int) -> int:
        """The largest piece to ask for at once: no burst may hold up others for long."""
        return most if self._rate == 0 else min(most, max(1, int(self._rate * BURST_S)))

    def pass_bytes(self, count: int, *, urgent: bool) -> None:
        """Take ``count`` bytes, waiting until they are due unless ``urgent``."""
        if self._rate == 0:
            return
        with self._lock:
            now = self._clock()
            self._tokens = min(self._rate * BURST_S, self._tokens + (now - self._filled_at) * self._rate)
            self._filled_at = now
            self._tokens -= count
            wait_s = -self._tokens / self._rate
        if wait_s > 0 and not urgent:
            self._sleep(wait_s)
