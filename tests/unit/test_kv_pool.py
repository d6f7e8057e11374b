"""The pool is one piece of memory seen as blocks, as bytes, and through a descriptor that peers can open."""

import os
import sys
from dataclasses import replace

import pytest
import torch

from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError, InvariantError
from llumnix.core.messages.control import KvLayout
from llumnix.instance.kv_pool import GIB, KvPool, memfd_name, pool_blocks

LAYOUT = KvLayout(blocks=6, layers=2, kv_heads=3, block_size=4, head_dim=8, dtype="bfloat16")
CPU = torch.device("cpu")


def test_bytes_and_blocks_are_the_same_memory() -> None:
    pool = KvPool(LAYOUT, "unit", CPU)
    assert pool.tensor.shape == (6, 2, 2, 3, 4, 8) and pool.tensor.dtype == torch.bfloat16
    assert pool.bytes_view().shape == (6, LAYOUT.block_bytes)
    assert not pool.bytes_view().any()
    pool.tensor[3] = 1.5
    assert pool.bytes_view()[3].any() and not pool.bytes_view()[[0, 1, 2, 4, 5]].any()
    pool.bytes_view()[5] = pool.bytes_view()[3]
    assert torch.equal(pool.tensor[5], pool.tensor[3])
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")
def test_a_peer_can_open_the_pool_by_descriptor() -> None:
    pool = KvPool(LAYOUT, "unit-peer", CPU)
    path = f"/proc/{os.getpid()}/fd/{pool.fd}"
    assert memfd_name("unit-peer") in os.readlink(path)
    pool.tensor[2] = -3.0
    with open(path, "rb") as peer:
        peer.seek(2 * LAYOUT.block_bytes)
        seen = torch.frombuffer(bytearray(peer.read(LAYOUT.block_bytes)), dtype=torch.uint8)
    assert torch.equal(seen, pool.bytes_view()[2])
    pool.close()
    assert pool.fd == -1 and not os.path.exists(path)


def test_a_closed_pool_refuses_use() -> None:
    pool = KvPool(LAYOUT, "unit-closed", CPU)
    pool.close()
    pool.close()
    with pytest.raises(InvariantError, match="unit-closed"):
        _ = pool.tensor
    with pytest.raises(InvariantError, match="unit-closed"):
        pool.bytes_view()


@pytest.mark.parametrize("name", ["", "x" * 300])
def test_a_name_must_fit_the_kernel(name: str) -> None:
    with pytest.raises(ConfigurationError, match="name"):
        KvPool(LAYOUT, name, CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")
def test_a_pool_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"kv_gib.*more than the machine"):
        KvPool(replace(LAYOUT, blocks=1 << 40), "unit-huge", CPU)


def test_size_comes_from_blocks_or_from_memory() -> None:
    assert pool_blocks(EngineConfig(kv_blocks=7), 1000, CPU) == 7
    assert pool_blocks(EngineConfig(kv_gib=0.5), 1 << 20, CPU) == 512
    with pytest.raises(ConfigurationError, match="kv_gib"):
        pool_blocks(EngineConfig(kv_gib=0.5), GIB, CPU)
