"""Who listens to the manager: the frontends, those who have still to introduce themselves, and what every
process has to hear about deaths.

A frontend is known by its address and forgotten after FRONTEND_MEMORY_S without a word. Deaths are remembered
so that a late message of an ended process is ignored, told again for FENCE_REPEAT_S, since a message may be
lost, and told to newcomers. Called by the global scheduler only.
"""

from dataclasses import dataclass

from llumnix.core.effects import Send
from llumnix.core.messages.control import Fenced, HelloWanted

FRONTEND_MEMORY_S = 10.0
FRONTENDS_MAX = 10_000
ASK_AGAIN_S = 0.2
STRANGERS_MAX = 10_000
FENCE_REPEAT_S = 5.0
DEATHS_MAX = 1_000


@dataclass(slots=True)
class Death:
    """One ended process."""

    fenced: Fenced
    at: float


class Audience:
    """Frontends by address, and deaths by (instance, incarnation), oldest first."""

    def __init__(self) -> None:
        self._heard_at: dict[str, float] = {}
        self._deaths: dict[tuple[str, str], Death] = {}
        self._strangers: dict[str, float] = {}

    @property
    def frontends(self) -> tuple[str, ...]:
        """Addresses, in the order they came."""
        return tuple(self._heard_at)

    def heard(self, address: str, now: float) -> bool:
        """A frontend said hello. True if it is new and there is room for it."""
        new = address not in self._heard_at
        if new and len(self._heard_at) >= FRONTENDS_MAX:
            return False
        self._heard_at[address] = now
        return new

    def ask_stranger(self, address: str, now: float) -> list[Send]:
        """Ask somebody unknown for a hello, unless that was done a moment ago."""
        if now < self._strangers.get(address, now):
            return []
        if len(self._strangers) >= STRANGERS_MAX:
            self._strangers.clear()
        self._strangers[address] = now + ASK_AGAIN_S
        return [Send(address, HelloWanted())]

    def introduced(self, address: str) -> None:
        """They have said hello."""
        self._strangers.pop(address, None)

    def knows(self, address: str, now: float) -> bool:
        """Whether a frontend that just spoke has said hello before."""
        if address not in self._heard_at:
            return False
        self._heard_at[address] = now
        return True

    def forget_silent(self, now: float) -> list[str]:
        """Forget frontends not heard of for too long, and return them."""
        self._strangers = {address: at for address, at in self._strangers.items() if at > now}
        gone = [address for address, at in self._heard_at.items() if now - at > FRONTEND_MEMORY_S]
        for address in gone:
            del self._heard_at[address]
        return gone

    def died(self, instance_id: str, incarnation: str, now: float) -> bool:
        """Remember a death. False if it was known."""
        key = (instance_id, incarnation)
        if key in self._deaths:
            return False
        self._deaths[key] = Death(Fenced(instance_id, incarnation), now)
        if len(self._deaths) > DEATHS_MAX:
            del self._deaths[next(iter(self._deaths))]
        return True

    def is_dead(self, instance_id: str, incarnation: str) -> bool:
        """Whether that process has ended."""
        return (instance_id, incarnation) in self._deaths

    def announce(self, instance_id: str, incarnation: str, addresses: tuple[str, ...]) -> list[Send]:
        """A death just remembered, for all frontends and everyone at ``addresses``."""
        fenced = self._deaths[instance_id, incarnation].fenced
        return [Send(address, fenced) for address in (*self._heard_at, *addresses)]

    def tell(self, address: str) -> list[Send]:
        """Every death remembered, for a newcomer."""
        return [Send(address, death.fenced) for death in self._deaths.values()]

    def repeat(self, addresses: tuple[str, ...], now: float) -> list[Send]:
        """Recent deaths, for everyone at ``addresses`` and all frontends."""
        recent = [death.fenced for death in self._deaths.values() if now - death.at <= FENCE_REPEAT_S]
        return [Send(address, fenced) for fenced in recent for address in (*self._heard_at, *addresses)]
