"""One direction of swapping between two pools: turns a job into copies and does them.

Belongs to one thread at a time. Used by the copier's workers and by benchmarks.
"""

from llumnix.core.config import SwapConfig
from llumnix.core.errors import ConfigurationError
from llumnix.instance.copy_ladder import ALLOWED_RUNGS, CopyLadder, CopyTotals, PoolShape, Rung, paired_runs
from llumnix.instance.kv_pool import PROBED_BLOCKS, KvPool
from llumnix.instance.swap import SwapDirection, SwapJob
from llumnix.instance.swap_calibration import calibrate, move
from llumnix.kernels.copies import mover


class SwapLane:
    """See the module. Measures the rungs when made, so the pools must still be all zeros. Raises
    ConfigurationError if no rung that ``config`` allows works here."""

    def __init__(
        self, direction: SwapDirection, device_pool: KvPool, host_pool: KvPool, config: SwapConfig
    ) -> None:
        self.direction = direction
        self.totals = CopyTotals()
        device_bytes, host_bytes = device_pool.bytes_view(), host_pool.bytes_view()
        out = direction is SwapDirection.OUT
        self._mover = mover(device_bytes, host_bytes, to_host=out)
        probed = (device_bytes[:PROBED_BLOCKS], host_bytes[:PROBED_BLOCKS])
        costs = calibrate(self._mover, *probed, to_host=out)
        block_bytes, planes = device_pool.layout.block_bytes, 2 * device_pool.layout.layers
        self._blocks = PoolShape.block_first(block_bytes)
        self._pieces = PoolShape.block_first_pieces(block_bytes, planes)
        allowed = [rung for rung in ALLOWED_RUNGS[config.swap_copies] if rung in costs]
        if not allowed:
            raise ConfigurationError(f"swap_copies {config.swap_copies!r} does not work on this device")
        self.ladder = CopyLadder(costs, allowed, block_bytes, planes)

    def copy(self, job: SwapJob) -> None:
        """Do a job of this direction; when it returns, the bytes have arrived."""
        runs = paired_runs(job.device_blocks, job.host_blocks)
        rung = self.ladder.choose(len(job.device_blocks), len(runs))
        shape = self._pieces if rung is Rung.PIECE else self._blocks
        move(self._mover, rung, runs, (shape, shape))
        self.totals.copies += self.ladder.copies(rung, len(job.device_blocks), len(runs))
