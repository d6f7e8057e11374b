"""An engine core and the executor that computes its plans, as one: what an engine thread or a benchmark
runs."""

from collections.abc import Callable

from llumnix.core.config import EngineConfig
from llumnix.core.views import SelectionPolicy
from llumnix.instance.engine import StepResult
from llumnix.instance.engine_core import EngineCore
from llumnix.instance.executor import Executor
from llumnix.instance.model_limits import ModelLimits


class InProcessEngine(EngineCore):
    """An Engine with its model. Belongs to one thread."""

    def __init__(
        self, executor: Executor, config: EngineConfig, selection: SelectionPolicy | None = None
    ) -> None:
        super().__init__(ModelLimits.of(executor, config), config, selection)
        self.executor = executor

    def step(self, clock: Callable[[], float]) -> StepResult:
        """Schedule, compute and apply one step; ``clock`` gives seconds of any fixed origin. Errors of the
        executor are raised as they are, and then no token of the step was taken in."""
        started = clock()
        plan = self.schedule(started)
        sampled = self.executor.execute(plan) if plan.chunks else []
        ended = clock()
        return self.apply(plan, sampled, ended, ended - started)
