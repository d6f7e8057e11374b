"""One engine in virtual time, no cluster: the real core, a cost model for steps, a host link for copies.

Computing and waiting let virtual time pass; nothing else does. So code that drives an InProcessEngine by its
clock drives this one too. Used by the fairness and swap benchmarks.
"""

from llumnix.core.config import EngineConfig, SwapConfig
from llumnix.core.messages.control import KvLayout
from llumnix.instance.copy_ladder import CopyLadder
from llumnix.instance.executor import SampledToken, StepPlan
from llumnix.sim.cost import CostModel
from llumnix.sim.swap import HostLink, VirtualCopier
from llumnix.sim.tokens import EOS_TOKEN, VOCAB_SIZE, sample_chunks


class VirtualTime:
    """Seconds; call it for the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep_until(self, when: float) -> None:
        """Let time pass; a time gone by is fine."""
        self.now = max(self.now, when)


class VirtualExecutor:
    """An Executor whose steps take what the cost model says. The host pool is that of ``swap``;
    ``ladder_type`` as in VirtualCopier."""

    def __init__(
        self,
        cost: CostModel,
        engine: EngineConfig,
        swap: SwapConfig,
        link: HostLink,
        time: VirtualTime,
        *,
        ladder_type: type[CopyLadder] = CopyLadder,
    ) -> None:
        self._cost, self._time = cost, time
        self._layout = cost.layout(engine.block_size, engine.kv_blocks * engine.block_size)
        self._copier = VirtualCopier(
            link, self._layout, swap, now=time, sleep_until=time.sleep_until, ladder_type=ladder_type
        )

    @property
    def kv_layout(self) -> KvLayout:
        return self._layout

    @property
    def max_model_len(self) -> int:
        return self._cost.max_model_len

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset((EOS_TOKEN,))

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE

    @property
    def copier(self) -> VirtualCopier:
        return self._copier

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        """See Executor."""
        self._time.now += self._cost.plan_s(plan.chunks)
        return sample_chunks(plan.chunks)
