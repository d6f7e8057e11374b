"""An engine whose blocks are words in two lists, so that every copy between them and every step that reads or
writes them is checked, with copies that take as long, and fail as often, as a test likes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from llumnix.core.config import EngineConfig, SchedulerConfig, SwapConfig
from llumnix.instance.executor import SampledToken, StepPlan
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.simulated_executor import SimulatedExecutor
from llumnix.instance.swap import SwapDirection, SwapDone, SwapJob

Word = tuple[int, int] | None
"""The token and position whose KV a place holds."""


class WordCopier:
    """A Copier. Each call of ``done`` lets ``jobs_per_look`` queued jobs end, in the order begun; those that
    ``fails`` names destroy their destination."""

    def __init__(self, device: list[list[Word]], host_blocks: int, block_size: int) -> None:
        self.jobs_per_look = 1
        self.fails: Callable[[SwapJob], bool] = lambda job: False
        self.jobs: list[SwapJob] = []
        self.waits = 0
        self.queued: list[SwapJob] = []
        self._device = device
        self.host: list[list[Word]] = [[None] * block_size for _ in range(host_blocks)]
        self._ended: list[SwapDone] = []

    @property
    def host_blocks(self) -> int:
        return len(self.host)

    def begin(self, jobs: Sequence[SwapJob]) -> None:
        for job in jobs:
            assert job.device_blocks and len(job.device_blocks) == len(job.host_blocks)
            assert len(set(job.device_blocks)) == len(set(job.host_blocks)) == len(job.host_blocks)
        self.jobs += jobs
        self.queued += jobs

    def wait(self, job_ids: Collection[int]) -> None:
        self.waits += 1
        while any(job.job_id in job_ids for job in self.queued):
            self._end_first()

    def done(self) -> list[SwapDone]:
        for _ in range(min(self.jobs_per_look, len(self.queued))):
            self._end_first()
        ended, self._ended = self._ended, []
        return ended

    def cost_s(self, blocks: int, runs: int) -> float:
        return 1e-3 * blocks + 1e-4 * runs

    def in_use(self) -> dict[int, SwapDirection]:
        """The device blocks that queued jobs use."""
        return {block: job.direction for job in self.queued for block in job.device_blocks}

    def _end_first(self) -> None:
        job = self.queued.pop(0)
        failed = self.fails(job)
        for device, host in zip(job.device_blocks, job.host_blocks, strict=True):
            here, there = self._device, self.host
            if job.direction is SwapDirection.OUT:
                there[host] = [None] * len(here[device]) if failed else list(here[device])
            else:
                here[device] = [None] * len(here[device]) if failed else list(there[host])
        self._ended.append(SwapDone(job.job_id, "as the test wished" if failed else ""))


class WordExecutor(SimulatedExecutor):
    """Computing a position writes its token and number; attending to it later means finding them there."""

    def __init__(self, config: EngineConfig, host_blocks: int) -> None:
        super().__init__(config)
        self.words: list[list[Word]] = [[None] * config.block_size for _ in range(config.kv_blocks)]
        self._copier = WordCopier(self.words, host_blocks, config.block_size)

    @property
    def copier(self) -> WordCopier:
        return self._copier

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        size, in_use = self.kv_layout.block_size, self._copier.in_use()
        for chunk in plan.chunks:
            request = chunk.request
            for position in range(chunk.start):
                word = self.words[request.blocks[position // size]][position % size]
                assert word == (request.tokens[position], position), f"{request.request_id} at {position}"
            for position in range(chunk.start, chunk.start + chunk.count):
                block = request.blocks[position // size]
                assert block not in in_use, f"{request.request_id} writes block {block} while it is copied"
                self.words[block][position % size] = request.tokens[position], position
        return super().execute(plan)


def swapping_engine(
    host_blocks: int = 64, policy: str = "swap", swap: SwapConfig | None = None, **settings: int
) -> tuple[InProcessEngine, WordCopier]:
    """An engine with blocks of 4 tokens, 16 of them unless told otherwise, and its copier."""
    small = EngineConfig(kind="simulated", block_size=4, kv_blocks=16, step_tokens_max=64, batch_max=4)
    config = replace(small, **settings)
    executor = WordExecutor(config, host_blocks)
    engine = InProcessEngine(executor, config, swap=swap)
    engine.configure(SchedulerConfig(preemption_policy=policy))
    return engine, executor.copier
