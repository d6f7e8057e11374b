"""The simulated network: addresses, latency, and what goes wrong with messages.

Without faults every message takes ``latency_s`` and order is kept, as on a healthy local network. Faults are
drawn per message: lost, doubled, late (which also reorders). Message objects are handed over as they are;
nothing mutates one.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llumnix.sim.clock import Clock

LATENCY_S = 0.0005


@dataclass(frozen=True, slots=True)
class MessageFaults:
    """Chances per message. A late one takes exponentially longer, ``late_s`` on average; ``jitter_s`` is
    added to every message in the same way."""

    lost: float = 0.0
    doubled: float = 0.0
    late: float = 0.0
    late_s: float = 0.5
    jitter_s: float = 0.0

    @property
    def none(self) -> bool:
        """Whether nothing goes wrong."""
        return not (self.lost or self.doubled or self.late or self.jitter_s)


class Network:
    """Carries messages to whoever is at an address; those to nobody are lost. ``on_send`` sees each first."""

    def __init__(self, clock: Clock, seed: int, latency_s: float = LATENCY_S) -> None:
        self.latency_s = latency_s
        self.messages = 0
        self.faults = MessageFaults()
        self.on_send: Callable[[str, object], None] | None = None
        self._clock = clock
        self._random = random.Random(f"network {seed}")
        self._receivers: dict[str, Callable[[Any], None]] = {}

    def attach(self, address: str, receive: Callable[[Any], None]) -> None:
        """Someone takes messages there from now on."""
        self._receivers[address] = receive

    def detach(self, address: str) -> None:
        """Nobody takes messages there any more."""
        self._receivers.pop(address, None)

    def send(self, address: str, message: object) -> None:
        """Hand a message over to the network."""
        self.messages += 1
        if self.on_send is not None:
            self.on_send(address, message)
        if self.faults.none:
            self._clock.in_line(self._clock.now + self.latency_s, self._deliver, (address, message))
            return
        chance, faults = self._random.random, self.faults
        copies = 0 if chance() < faults.lost else 1 + (chance() < faults.doubled)
        for _ in range(copies):
            delay_s = self.latency_s
            if faults.jitter_s:
                delay_s += self._random.expovariate(1 / faults.jitter_s)
            if chance() < faults.late:
                delay_s += self._random.expovariate(1 / faults.late_s)
            self._clock.at(self._clock.now + delay_s, self._deliver, (address, message))

    def _deliver(self, parcel: tuple[str, object]) -> None:
        receive = self._receivers.get(parcel[0])
        if receive is not None:
            receive(parcel[1])
