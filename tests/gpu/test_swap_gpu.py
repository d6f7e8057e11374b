"""Every way of copying between a GPU's pool and pinned host memory moves the right bytes."""

import pytest
import torch

from llumnix.core.config import SwapConfig
from llumnix.core.messages.control import KvLayout
from llumnix.instance.copy_ladder import Rung
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.swap import SwapDirection, SwapDone, SwapJob
from llumnix.instance.swap_calibration import calibrate
from llumnix.instance.swap_space import SwapSpace
from llumnix.kernels.copies import mover

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYOUT = KvLayout(blocks=64, layers=4, kv_heads=2, block_size=16, head_dim=64, dtype="bfloat16")


@pytest.mark.parametrize("copies", ["auto", "run", "staging", "block", "piece"])
def test_blocks_go_out_and_come_back(copies: str) -> None:
    pool = KvPool(LAYOUT, "swap-gpu", torch.device("cuda"))
    space = SwapSpace.beside(pool, SwapConfig(host_blocks=80, swap_copies=copies))
    assert space is not None and space.pool.fd >= 0
    device, host = pool.bytes_view(), space.pool.bytes_view()
    device.copy_(torch.randint(0, 256, device.shape, dtype=torch.uint8, device="cuda"))
    torch.cuda.synchronize()
    before = device.cpu()
    space.copier.begin(
        [
            SwapJob(1, "r", SwapDirection.OUT, (4, 3, 2, 9, 10), (30, 29, 28, 7, 8)),
            SwapJob(2, "r", SwapDirection.IN, (40, 41, 42), (28, 29, 30)),
        ]
    )
    space.copier.wait([1, 2])
    assert space.copier.done() == [SwapDone(1), SwapDone(2)]
    assert torch.equal(host[[30, 29, 28, 7, 8]], before[[4, 3, 2, 9, 10]])
    assert torch.equal(device[40:43].cpu(), before[2:5])
    space.close()
    pool.close()


@pytest.mark.parametrize("to_host", [True, False])
def test_calibration_finds_every_way_that_the_driver_has(to_host: bool) -> None:
    pool = KvPool(LAYOUT, "swap-gpu", torch.device("cuda"))
    host = KvPool(LAYOUT, "swap-gpu-host", torch.device("cpu"), pinned=True)
    way = mover(pool.bytes_view(), host.bytes_view(), to_host=to_host)
    costs = calibrate(way, pool.bytes_view(), host.bytes_view(), to_host=to_host)
    assert {Rung.RUN, Rung.STAGING} <= costs.keys() and (Rung.BATCH in costs) == way.batches
    host.close()
    pool.close()
