"""An engine core and the executor that computes its plans, as one: what an engine thread or a benchmark
runs."""

from collections.abc import Callable

from llumnix.core.config import EngineConfig, SwapConfig
from llumnix.core.views import SelectionPolicy
from llumnix.instance.engine import StepResult
from llumnix.instance.engine_core import EngineCore
from llumnix.instance.executor import Executor, StepPlan
from llumnix.instance.model_limits import ModelLimits


class InProcessEngine(EngineCore):
    """An Engine with its model. Belongs to one thread."""

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        selection: SelectionPolicy | None = None,
        swap: SwapConfig | None = None,
    ) -> None:
        """``swap``: what the executor's copier was made with."""
        super().__init__(ModelLimits.of(executor, config), config, selection, swap, executor.copier)
        self.executor = executor

    def step(self, clock: Callable[[], float]) -> StepResult:
        """Schedule, compute and apply one step; ``clock`` gives seconds of any fixed origin. Errors of the
        executor are raised as they are, and then no token of the step was taken in."""
        started = clock()
        plan = self._copied_plan(started)
        sampled = self.executor.execute(plan) if plan.chunks else []
        ended = clock()
        return self.apply(plan, sampled, ended, ended - started)

    def _copied_plan(self, now: float) -> StepPlan:
        """The next plan, its copies begun and those it waits for ended. Copies that fail meanwhile make it
        another plan; each fails once, so there is a last one."""
        copier = self.executor.copier
        if copier is None:
            return self.schedule(now)
        self.swapped(copier.done())
        while True:
            plan = self.schedule(now)
            copier.begin(plan.jobs)
            if not plan.wait_for:
                return plan
            copier.wait(plan.wait_for)
            if not self.swapped(copier.done()):
                return plan
