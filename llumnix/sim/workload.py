"""What clients ask for, and when: the input of a simulation.

A workload is a sequence of arrivals in order of time, made anew for every run from its seed, so that policies
are compared on the very same requests. Nothing here knows of instances.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llumnix.core.errors import ConfigurationError
from llumnix.sim.lengths import lengths


@dataclass(frozen=True, slots=True)
class Turn:
    """A later turn of a conversation, asked ``think_s`` after the answer before it. Its prompt is all that
    was said so far and ``new_tokens`` more."""

    think_s: float
    new_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. ``turns`` follow it. ``hashes`` of its prompt's leading parts of HASHED_TOKENS tokens.
    ``high``: results tell it apart as one of high priority, also where it was sent with none."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    scheduling_priority: int = 0
    execution_priority: int = 0
    turns: tuple[Turn, ...] = ()
    hashes: tuple[int, ...] = ()
    high: bool = False


class Workload(Protocol):
    """``requests`` is how many there will be, turns included."""

    @property
    def name(self) -> str: ...

    @property
    def requests(self) -> int: ...

    def arrivals(self) -> Iterator[Arrival]: ...


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of the requests by tenant and priority: ``high_share`` of them are high and get
    ``high_priority`` for scheduling and execution (0: like all others); tenants are drawn by weight."""

    high_share: float = 0.0
    high_priority: int = 1
    tenants: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.high_share <= 1:
            raise ConfigurationError(
                f"the share of high priority must be within 0 and 1, got {self.high_share}"
            )
        for name, weight in self.tenants:
            if not 0 < weight < float("inf"):
                raise ConfigurationError(
                    f"tenant {name}: the weight must be above 0 and finite, got {weight}"
                )


@dataclass(frozen=True, slots=True)
class Conversations:
    """Each arrival begins a conversation of geometrically many turns, ``turns_mean`` on average, with
    exponential pauses."""

    turns_mean: float
    think_s: float

    def __post_init__(self) -> None:
        if not 1 <= self.turns_mean < float("inf"):
            raise ConfigurationError(f"turns must be at least 1 on average and finite, got {self.turns_mean}")
        if not 0 <= self.think_s < float("inf"):
            raise ConfigurationError(
                f"the pause between turns must not be negative and be finite, got {self.think_s}"
            )


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Requests at ``rate`` per second with Gamma-distributed gaps of coefficient of variation ``cv`` (1:
    Poisson), lengths by name. ``tokens_max`` bounds prompt + output; a conversation ends where it would be
    passed."""

    lengths: str
    rate: float
    count: int
    seed: int
    cv: float = 1.0
    tokens_max: int = 1 << 30
    mix: Mix = Mix()
    conversations: Conversations | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf"):
            raise ConfigurationError(f"the rate must be above 0, got {self.rate}")
        if self.count < 1:
            raise ConfigurationError(f"there must be at least one request, got {self.count}")
        if not 0 < self.cv < float("inf"):
            raise ConfigurationError(f"the coefficient of variation must be above 0, got {self.cv}")
        lengths(self.lengths)

    @property
    def name(self) -> str:
        bursts = "" if self.cv == 1 else f", CV {self.cv:g}"
        return f"{self.lengths} at {self.rate:g}/s{bursts}"

    @property
    def requests(self) -> int:
        return self.count

    def arrivals(self) -> Iterator[Arrival]:
        streams = np.random.default_rng(self.seed).spawn(5)
        gaps_rng, in_rng, out_rng, mix_rng, turn_rng = streams
        shape = 1 / self.cv**2
        times = np.cumsum(gaps_rng.gamma(shape, 1 / (shape * self.rate), self.count))
        inputs, outputs = lengths(self.lengths)
        prompts = np.minimum(inputs.draw(in_rng, self.count), self.tokens_max - 1)
        answers = np.minimum(outputs.draw(out_rng, self.count), self.tokens_max - prompts)
        high = mix_rng.random(self.count) < self.mix.high_share
        tenants = self._tenants(mix_rng)
        if self.conversations is not None:
            yield from self._talks(self.conversations, times, prompts, answers, high, tenants, turn_rng)
            return
        for i in range(self.count):
            priority = self.mix.high_priority if high[i] else 0
            yield Arrival(
                at_s=float(times[i]),
                prompt_tokens=int(prompts[i]),
                output_tokens=int(answers[i]),
                tenant=tenants[i],
                scheduling_priority=priority,
                execution_priority=priority,
                high=bool(high[i]),
            )

    def _tenants(self, rng: np.random.Generator) -> list[str]:
        if not self.mix.tenants:
            return [""] * self.count
        weights = np.array([weight for _, weight in self.mix.tenants])
        drawn = rng.choice(len(weights), self.count, p=weights / weights.sum())
        return [self.mix.tenants[place][0] for place in drawn]

    def _talks(
        self,
        talk: Conversations,
        times: NDArray[np.float64],
        prompts: NDArray[np.int64],
        answers: NDArray[np.int64],
        high: NDArray[np.bool_],
        tenants: list[str],
        rng: np.random.Generator,
    ) -> Iterator[Arrival]:
        """Lengths are used up in order: one pair for each turn of each conversation. As fewer conversations
        than requests begin, they begin at times stretched by the turns each has on average."""
        used = begun = 0
        while used < self.count:
            wanted = min(int(rng.geometric(1 / talk.turns_mean)), self.count - used)
            first = used
            said = int(prompts[first] + answers[first])
            turns: list[Turn] = []
            for place in range(first + 1, first + wanted):
                new, out = int(prompts[place]), int(answers[place])
                if said + new + out > self.tokens_max:
                    break
                turns.append(Turn(float(rng.exponential(talk.think_s)), new, out))
                said += new + out
            used += 1 + len(turns)
            priority = self.mix.high_priority if high[first] else 0
            yield Arrival(
                at_s=float(times[begun]) * talk.turns_mean,
                prompt_tokens=int(prompts[first]),
                output_tokens=int(answers[first]),
                tenant=tenants[first],
                scheduling_priority=priority,
                execution_priority=priority,
                turns=tuple(turns),
                high=bool(high[first]),
            )
            begun += 1
