"""The simulated executor in real time, over a real KV pool: a cluster without a model whose KV still matters.

A step sleeps for what it costs. "Computing" a position writes its token and its number into the pool, as key
and as value; attending to earlier ones means finding there what was written, wherever that happened. So every
migration between simulated engines, and every swap, proves that the right bytes arrived in the right blocks.
"""

import time

import torch

from llumnix.core.config import EngineConfig, SwapConfig
from llumnix.core.errors import InvariantError
from llumnix.instance.executor import Chunk, SampledToken, StepPlan
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.simulated_executor import SimulatedExecutor
from llumnix.instance.swap_copier import SwapCopier
from llumnix.instance.swap_space import SwapSpace


class RealTimeSimulatedExecutor(SimulatedExecutor):
    """See the module. ``pool_name`` names the pool's shared memory, one per instance.

    KV is checked in full when a request joins (or comes back) and whenever it begins a block: the cost of a
    check is linear in its context, so checking at every step would be the step's main work."""

    def __init__(self, config: EngineConfig, pool_name: str, swap: SwapConfig | None = None) -> None:
        super().__init__(config)
        self.pool = KvPool(self.kv_layout, pool_name, torch.device("cpu"))
        self.swap_space = SwapSpace.beside(self.pool, swap)
        self._expected_start: dict[str, int] = {}

    @property
    def host_pool(self) -> KvPool | None:
        """Where KV is swapped to; None: nowhere."""
        return None if self.swap_space is None else self.swap_space.pool

    @property
    def copier(self) -> SwapCopier | None:
        return None if self.swap_space is None else self.swap_space.copier

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        """Raises InvariantError if the KV of a request is not what its tokens say."""
        ready_at = time.monotonic() + self.cost_s(plan)
        block_size = self.kv_layout.block_size
        for chunk in plan.chunks:
            joined = self._expected_start.get(chunk.request.request_id) != chunk.start
            if chunk.start and (joined or chunk.start % block_size == 0):
                self._check(chunk)
        self._write(plan)
        self._expected_start = {chunk.request.request_id: chunk.start + chunk.count for chunk in plan.chunks}
        sampled = super().execute(plan)
        time.sleep(max(0.0, ready_at - time.monotonic()))
        return sampled

    def close(self) -> None:
        """Give the pools' memory up."""
        if self.swap_space is not None:
            self.swap_space.close()
        self.pool.close()

    def _check(self, chunk: Chunk) -> None:
        request, size = chunk.request, self.kv_layout.block_size
        blocks = torch.tensor(request.blocks[: -(-chunk.start // size)])
        # [blocks, key or value, position in block, token or position]
        held = self.pool.tensor[blocks, 0, :, 0, :, :2]
        held = held.transpose(0, 1).reshape(2, -1, 2)[:, : chunk.start]
        tokens = torch.tensor(request.tokens[: chunk.start])
        if not ((held[..., 0] == tokens).all() and (held[..., 1] == torch.arange(chunk.start)).all()):
            raise InvariantError(f"KV of {request.request_id} is not what its {chunk.start} tokens left")

    def _write(self, plan: StepPlan) -> None:
        size = self.kv_layout.block_size
        blocks, offsets, values = [], [], []
        for chunk in plan.chunks:
            request = chunk.request
            for position in range(chunk.start, chunk.start + chunk.count):
                blocks.append(request.blocks[position // size])
                offsets.append(position % size)
                values.append((request.tokens[position], position))
        written = torch.tensor(values, dtype=self.pool.tensor.dtype)
        for part in range(2):
            self.pool.tensor[torch.tensor(blocks), 0, part, 0, torch.tensor(offsets), :2] = written
