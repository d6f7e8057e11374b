"""Who is to be left alone for a while: requests that just moved or could not, instances that refused a
migration.

A success rests its key for the base time; each failure in a row doubles the rest. Called by the rescheduler.
"""

from dataclasses import dataclass

REST_MAX_S = 60.0
KEYS_MAX = 100_000


@dataclass(frozen=True, slots=True)
class Rest:
    """Until when, and how many failures in a row led to it."""

    until: float
    failures: int


class Backoff:
    """Rests by key. Failures are forgotten REST_MAX_S after the rest they led to; at KEYS_MAX the oldest
    goes."""

    def __init__(self, base_s: float) -> None:
        self.base_s = base_s
        self._rests: dict[str, Rest] = {}

    def __len__(self) -> int:
        return len(self._rests)

    def succeeded(self, key: str, now: float) -> None:
        """Rest for the base time; earlier failures are forgiven."""
        self._set(key, Rest(now + self.base_s, 0))

    def failed(self, key: str, now: float) -> None:
        """Rest twice as long as after the last failure, at most REST_MAX_S."""
        known = self._rests.get(key)
        failures = known.failures + 1 if known else 1
        doubled_s = self.base_s * 2.0 ** min(failures - 1, 30)
        self._set(key, Rest(now + min(doubled_s, REST_MAX_S), failures))

    def forgive(self, key: str) -> None:
        """It works again: no rest, no failures."""
        self._rests.pop(key, None)

    def resting(self, now: float) -> list[str]:
        """Keys whose rest is not over."""
        return [key for key, rest in self._rests.items() if rest.until > now]

    def rests(self, key: str, now: float) -> bool:
        """Whether the rest of this one is not over."""
        rest = self._rests.get(key)
        return rest is not None and rest.until > now

    def expire(self, now: float) -> None:
        """Forget what no longer matters."""
        for key, rest in list(self._rests.items()):
            if now > rest.until + (REST_MAX_S if rest.failures else 0.0):
                del self._rests[key]

    def _set(self, key: str, rest: Rest) -> None:
        self._rests.pop(key, None)
        self._rests[key] = rest
        if len(self._rests) > KEYS_MAX:
            del self._rests[next(iter(self._rests))]
