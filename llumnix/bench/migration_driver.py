"""Drives a pair of instances for the migration benchmark: gives them work, moves one request to and fro,
and turns the times at which tokens were heard into downtimes and step times. One clock, that of the
listener, for everything.

An ordinary step is the median time between two tokens of the moving request while it rests at its new
place. The downtime is the time from the last token heard from the source to the first heard from the
target, less one ordinary step; nothing is clamped, so noise may make it negative. What the others' steps
lose is worked out in migration_steps.py.
"""

import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from llumnix.bench.migration_pair import NAMES, Pair
from llumnix.bench.migration_steps import Steps, Window, compare
from llumnix.core.epochs import FIRST_EPOCH, next_generation
from llumnix.core.errors import LlumnixError
from llumnix.core.messages.control import MigrateOrder, MigrationEnded, MigrationOutcome
from llumnix.core.messages.serving import Abort, Rejected, RequestSpec, Submit, TokenBatch
from llumnix.core.sampling import SamplingParams

WAIT_S = 240.0
BATCH, BATCH_TOKENS = 4, 512
OUTPUT_TOKENS_MAX = 2000
REST_TOKENS = 16
SETTLING_TOKENS = 2
VOCABULARY = 8000


class BenchmarkFailed(LlumnixError):
    """Something that a benchmark takes for granted did not happen."""


@dataclass(frozen=True, slots=True)
class Heard:
    """One token: when, from whom, in which epoch."""

    at: float
    instance: str
    epoch: int


class Ear:
    """Keeps what instances say. Fed from any thread; waited on by the benchmark's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.tokens: dict[str, list[Heard]] = {}
        self.ended: dict[str, MigrationEnded] = {}
        self.rejected: list[Rejected] = []

    def heard(self, message: object, at: float) -> None:
        with self._changed:
            if isinstance(message, TokenBatch):
                for delta in message.deltas:
                    heard = Heard(at, message.instance_id, delta.epoch)
                    self.tokens.setdefault(delta.request_id, []).extend([heard] * len(delta.tokens))
            elif isinstance(message, MigrationEnded):
                self.ended[message.migration_id] = message
            elif isinstance(message, Rejected):
                self.rejected.append(message)
            self._changed.notify_all()

    def wait_tokens(self, request_id: str, count: int) -> None:
        """Until a request has said ``count`` tokens in all."""
        self._wait(lambda: len(self.tokens.get(request_id, ())) >= count, f"tokens of {request_id}")

    def wait_ended(self, migration_id: str) -> MigrationEnded:
        self._wait(lambda: migration_id in self.ended, f"the end of migration {migration_id}")
        return self.ended[migration_id]

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        with self._changed:
            come = self._changed.wait_for(lambda: ready() or bool(self.rejected), WAIT_S)
            if self.rejected:
                raise BenchmarkFailed(f"a request was refused: {self.rejected[0].reason}")
            if not come:
                raise BenchmarkFailed(f"waited {WAIT_S:g} s for {what}")


@dataclass(frozen=True, slots=True)
class Moved:
    """One migration as it was seen from outside. Times in seconds. ``steps``: those of the requests that
    stay, None if too few were heard."""

    downtime_s: float
    ordinary_step_s: float
    stages: int
    kv_bytes: int
    duration_s: float
    steps: Steps | None


@dataclass(frozen=True, slots=True)
class Arrived:
    """One migration of a request that did not run: seconds from the order to its first token at the target,
    and to the end of the migration."""

    first_token_s: float
    duration_s: float
    kv_bytes: int


class Driver:
    """Work for a pair. ``batch`` requests of ``batch_tokens`` stay on each instance all the time."""

    def __init__(self, pair: Pair, ear: Ear, *, batch: int, batch_tokens: int, seed: int) -> None:
        self._pair = pair
        self._ear = ear
        self._random = random.Random(seed)
        self._batch = batch
        self._batch_tokens = batch_tokens
        self._count = 0

    def measure(
        self, length: int, repeats: int, still_busy: Callable[[], None] = lambda: None
    ) -> list[Moved]:
        """Move a request of ``length`` prompt tokens ``repeats`` times between the two instances.
        ``still_busy`` is called after that, with all requests still running. Raises BenchmarkFailed if a
        migration does not succeed."""
        here, there = NAMES
        moving = self._submit(here, length)
        self._ear.wait_tokens(moving, 1)  # its prefill takes the longest: nobody decodes meanwhile
        staying = {
            name: [self._submit(name, self._batch_tokens) for _ in range(self._batch)] for name in NAMES
        }
        for request_id in itertools.chain(*staying.values()):
            self._ear.wait_tokens(request_id, 1)
        witnesses = {name: staying[name][0] for name in NAMES}
        self._rest(moving)
        rested, moves = time.monotonic(), []
        self._rest(moving)
        for _ in range(repeats):
            time.sleep(self._random.uniform(0, 0.05))  # any phase between the two instances' steps
            ordered = time.monotonic()
            ended = self._migrate(moving, there)
            if ended.outcome is not MigrationOutcome.COMMITTED:
                raise BenchmarkFailed(f"a migration was {ended.outcome.value}: {ended.reason}")
            self._rest(moving)
            moves.append(self._moved(moving, (here, there), ended, witnesses, (rested, ordered)))
            here, there = there, here
            arrived = [h.at for h in self._ear.tokens[moving] if h.at > ordered and h.instance == here]
            rested = arrived[SETTLING_TOKENS]
        still_busy()
        for name, request_ids in staying.items():
            for request_id in request_ids:
                self._pair.send(name, Abort(request_id, next_generation(FIRST_EPOCH)))
        self._pair.send(here, Abort(moving, next_generation(FIRST_EPOCH)))
        return moves

    def _rest(self, request_id: str) -> None:
        self._ear.wait_tokens(request_id, len(self._ear.tokens[request_id]) + REST_TOKENS)

    def recompute_s(self, length: int, repeats: int) -> list[float]:
        """Time from submission to first token of a request of that length, less one ordinary step, under
        the same load: what moving it without its KV would cost."""
        staying = [self._submit("b", self._batch_tokens) for _ in range(self._batch)]
        for request_id in staying:
            self._ear.wait_tokens(request_id, 1)
        times = []
        for _ in range(repeats):
            begun = time.monotonic()
            request_id = self._submit("b", length)
            self._ear.wait_tokens(request_id, REST_TOKENS)
            said = [heard.at for heard in self._ear.tokens[request_id]]
            times.append(said[0] - begun - _median([b - a for a, b in itertools.pairwise(said)]))
            self._pair.send("b", Abort(request_id, FIRST_EPOCH))
        for request_id in staying:
            self._pair.send("b", Abort(request_id, FIRST_EPOCH))
        return times

    def arrivals(self, length: int, repeats: int) -> list[Arrived]:
        """Let a request of ``length`` tokens be displaced by a more urgent one, then move it; ``repeats``
        times. An instance has room for ``batch`` requests and one. Raises BenchmarkFailed if a migration
        does not succeed."""
        here, there = NAMES
        staying = [self._submit(there, self._batch_tokens) for _ in range(self._batch)]
        urgent = [self._submit(here, self._batch_tokens, priority=1) for _ in range(self._batch)]
        for request_id in staying + urgent:
            self._ear.wait_tokens(request_id, 1)
        arrived = []
        for _ in range(repeats):
            moving = self._submit(here, length)
            self._ear.wait_tokens(moving, SETTLING_TOKENS)
            displacing = self._submit(here, REST_TOKENS, priority=1)
            self._ear.wait_tokens(displacing, REST_TOKENS)  # by then what is copied out has been
            said = len(self._ear.tokens[moving])
            time.sleep(self._random.uniform(0, 0.05))  # any phase of the target's steps
            ordered = time.monotonic()
            ended = self._migrate(moving, there)
            if ended.outcome is not MigrationOutcome.COMMITTED:
                raise BenchmarkFailed(f"a migration was {ended.outcome.value}: {ended.reason}")
            self._ear.wait_tokens(moving, said + 1)
            first = self._ear.tokens[moving][said]
            if first.instance != there:
                raise BenchmarkFailed(f"{moving} was not displaced")
            arrived.append(Arrived(first.at - ordered, ended.duration_s, ended.kv_bytes))
            self._pair.send(there, Abort(moving, next_generation(FIRST_EPOCH)))
            self._pair.send(here, Abort(displacing, FIRST_EPOCH))
        for name, request_ids in ((there, staying), (here, urgent)):
            for request_id in request_ids:
                self._pair.send(name, Abort(request_id, FIRST_EPOCH))
        return arrived

    def _moved(
        self,
        request_id: str,
        way: tuple[str, str],
        ended: MigrationEnded,
        witnesses: dict[str, str],
        since: tuple[float, float],
    ) -> Moved:
        """``witnesses``: a request that stays, on each instance. ``since``: when the request had settled, and
        when its move was ordered."""
        here, there = way
        said = self._ear.tokens[request_id]
        first = max(
            i for i in range(1, len(said)) if said[i].instance == there and said[i - 1].instance == here
        )
        ordinary = _median([b.at - a.at for a, b in itertools.pairwise(said[first:])])
        window = Window(*since, said[first - 1].at, said[first].at, said[-1].at)
        times = {name: [h.at for h in self._ear.tokens[stays]] for name, stays in witnesses.items()}
        return Moved(
            downtime_s=said[first].at - said[first - 1].at - ordinary,
            ordinary_step_s=ordinary,
            stages=ended.stages,
            kv_bytes=ended.kv_bytes,
            duration_s=ended.duration_s,
            steps=compare(window, times[here], times[there]),
        )

    def _migrate(self, request_id: str, there: str) -> MigrationEnded:
        self._count += 1
        here = next(name for name in NAMES if name != there)
        target = self._pair.hellos[there]
        order = MigrateOrder(
            migration_id=f"bench-{self._count}",
            request_id=request_id,
            target_id=there,
            target_incarnation=target.incarnation,
            target_address=target.address,
            reason="benchmark",
        )
        self._pair.send(here, order)
        return self._ear.wait_ended(order.migration_id)

    def _submit(self, name: str, prompt_tokens: int, priority: int = 0) -> str:
        self._count += 1
        spec = RequestSpec(
            request_id=f"bench-{self._count}",
            epoch=FIRST_EPOCH,
            frontend_address=self._pair.my_address,
            prompt_tokens=tuple(self._random.randrange(VOCABULARY) for _ in range(prompt_tokens)),
            output_tokens=(),
            sampling=SamplingParams(max_tokens=OUTPUT_TOKENS_MAX, seed=0, temperature=0.0, ignore_eos=True),
            scheduling_priority=priority,
            execution_priority=priority,
        )
        self._pair.send(name, Submit(spec))
        return spec.request_id


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
