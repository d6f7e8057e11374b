"""The steps that ``llumnix profile`` times, and the engine that runs them.

A scenario is one kind of step: so many requests that decode at these contexts, and perhaps one prefill chunk.
Its requests are adopted as a migration's would be, with KV that was never computed: what a step costs depends
on where KV lies and how much of it there is, not on what it says. So any context is there at once. Time is
taken around the whole step, scheduling and bookkeeping included, since that is what sets an engine's pace.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llumnix.core.config import EngineConfig
from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.errors import InvariantError
from llumnix.core.messages.serving import RequestSpec
from llumnix.core.sampling import SamplingParams
from llumnix.instance.executor import Executor, StepPlan
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.sim.cost import StepFeatures, plan_features

BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (32, 256, 1024)
CHUNKS = (16, 64, 256, 512)
STARTS = (0, 512, 1536)
MIXED_BATCHES, MIXED_CONTEXT, MIXED_CHUNKS = (2, 8, 24), 256, (32, 128, 384)
HELD_OUT = 16
WARMUP_STEPS, STEPS_MIN, STEPS_MAX, TRIES_MAX = 1, 2, 10, 16
SCENARIO_S = 0.8
WAITED_SHARE_MAX = 0.02
"""A step whose threads waited longer for a processor was disturbed by others; another is done for it."""
TASKS = Path("/proc/self/task")


@dataclass(frozen=True, slots=True)
class Scenario:
    """``contexts``: tokens known of each decoding request. ``chunk`` tokens are prefilled from ``start``
    on; 0: none."""

    contexts: tuple[int, ...]
    start: int = 0
    chunk: int = 0

    @property
    def longest(self) -> int:
        """Tokens of its longest request when all its steps are done."""
        return max((*self.contexts, self.start + self.chunk)) + TRIES_MAX

    def blocks(self, block_size: int) -> int:
        """KV blocks it needs at most."""
        lengths = [*self.contexts, *([self.start + self.chunk] if self.chunk else [])]
        return sum(-(-(length + TRIES_MAX) // block_size) for length in lengths)


@dataclass(frozen=True, slots=True)
class Point:
    """What one scenario's steps had to do (of its middle step) and took: median and mean seconds.
    ``disturbed`` steps were left out; not ``calm``: there were too few others, so nothing was left out."""

    features: StepFeatures
    median_s: float
    mean_s: float
    steps: int
    disturbed: int
    calm: bool


def grid() -> list[Scenario]:
    """The scenarios that a model is fitted to."""
    return [
        *(Scenario((context,) * batch) for batch in BATCHES for context in CONTEXTS),
        *(Scenario((), start, chunk) for start in STARTS for chunk in CHUNKS),
        *(Scenario((MIXED_CONTEXT,) * batch, 0, chunk) for batch in MIXED_BATCHES for chunk in MIXED_CHUNKS),
    ]


def held_out(seed: int) -> list[Scenario]:
    """Random scenarios within the grid's range, for checking a fit: batches of unequal contexts, half of them
    with a prefill chunk somewhere in its prompt."""
    rng = np.random.default_rng(seed)
    scenarios = []
    for number in range(HELD_OUT):
        batch = int(rng.integers(1, BATCHES[-1] + 1))
        contexts = tuple(int(length) for length in np.exp(rng.uniform(np.log(16), np.log(1024), batch)))
        chunk = int(np.exp(rng.uniform(np.log(16), np.log(CHUNKS[-1])))) if number % 2 else 0
        start = int(rng.integers(0, STARTS[-1] + 1)) if chunk else 0
        scenarios.append(Scenario(contexts, start, chunk))
    return scenarios


class _Watched(InProcessEngine):
    """An engine that notes what its plans have to do."""

    features = StepFeatures(0, 0, 0, 0)

    def schedule(self, now: float) -> StepPlan:
        plan = super().schedule(now)
        self.features = plan_features(plan.chunks)
        return plan


@dataclass(frozen=True, slots=True)
class _Step:
    features: StepFeatures
    seconds: float
    waited_s: float

    @property
    def disturbed(self) -> bool:
        return self.waited_s > WAITED_SHARE_MAX * self.seconds


def _waited_s() -> float:
    """How long this process's threads have been ready to run and had no processor; 0 where nobody counts."""
    waited_ns = 0
    for task in TASKS.glob("*/schedstat"):
        try:
            waited_ns += int(task.read_text().split()[1])
        except (OSError, IndexError):
            continue  # the thread has just ended
    return waited_ns * 1e-9


class Probe:
    """Runs scenarios on one engine that has nothing else to do."""

    def __init__(self, executor: Executor, config: EngineConfig) -> None:
        self._engine = _Watched(executor, config)
        self._config = config
        self._requests = 0

    def fits(self, scenario: Scenario) -> bool:
        """Whether this engine can do the scenario's steps as they are meant."""
        load, engine = self._engine.load(), self._engine
        return (
            scenario.longest <= engine.max_model_len
            and scenario.blocks(engine.block_size) <= load.capacity_blocks - load.used_blocks
            and len(scenario.contexts) + (scenario.chunk > 0) <= self._config.batch_max
            and len(scenario.contexts) + scenario.chunk <= self._config.step_tokens_max
        )

    def measure(self, scenario: Scenario) -> Point:
        """Step the scenario a few times. A prefill chunk is done anew for every step."""
        decoding = [self._adopt(length, length - 1) for length in scenario.contexts]
        taken: list[_Step] = []
        calm: list[_Step] = []
        began = time.perf_counter()
        while len(taken) < TRIES_MAX and len(calm) < WARMUP_STEPS + STEPS_MAX:
            if len(calm) >= WARMUP_STEPS + STEPS_MIN and time.perf_counter() - began > SCENARIO_S:
                break
            prompt = self._adopt(scenario.start + scenario.chunk, scenario.start) if scenario.chunk else None
            taken.append(self._step())
            if not taken[-1].disturbed or len(taken) <= WARMUP_STEPS:
                calm.append(taken[-1])
            if prompt is not None:
                self._engine.abort(prompt.request_id, prompt.epoch)
        for spec in decoding:
            self._engine.abort(spec.request_id, spec.epoch)
        enough = len(calm) >= WARMUP_STEPS + STEPS_MIN
        counted = (calm if enough else taken)[WARMUP_STEPS:]
        times = [step.seconds for step in counted]
        return Point(
            counted[len(counted) // 2].features,
            statistics.median(times),
            statistics.fmean(times),
            len(counted),
            len(taken) - len(calm),
            enough,
        )

    def _step(self) -> "_Step":
        waited_s = _waited_s()
        begin = time.perf_counter()
        self._engine.step(time.perf_counter)
        seconds = time.perf_counter() - begin
        return _Step(self._engine.features, seconds, _waited_s() - waited_s)

    def _adopt(self, known: int, computed: int) -> RequestSpec:
        """A request of ``known`` tokens of which ``computed`` have KV."""
        self._requests += 1
        name = f"profile-{self._requests}"
        sampling = SamplingParams(max_tokens=TRIES_MAX + 1, seed=0, ignore_eos=True)
        spec = RequestSpec(
            request_id=name,
            epoch=FIRST_EPOCH,
            frontend_address="",
            prompt_tokens=(1,) * known,
            output_tokens=(),
            sampling=sampling,
        )
        if computed == 0:
            refusal = self._engine.submit(spec, time.perf_counter())
        else:
            blocks = -(-(known + TRIES_MAX) // self._engine.block_size)
            if self._engine.reserve(name, blocks) is None:
                raise InvariantError(f"no room for {known} tokens in a profile")
            refusal = self._engine.adopt(name, spec, computed, time.perf_counter())
        if refusal is not None:
            raise InvariantError(f"the engine refused a request of a profile: {refusal.reason}")
        return spec
