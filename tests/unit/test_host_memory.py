"""How much host memory an instance takes if nobody said: no more than is there, and only what it uses."""

from pathlib import Path

import pytest
import torch

from llumnix.core.config import SwapConfig
from llumnix.core.messages.control import KvLayout
from llumnix.instance import kv_pool
from llumnix.instance.host_memory import available_bytes
from llumnix.instance.kv_pool import KvPool, host_pool

LAYOUT = KvLayout(blocks=2000, layers=2, kv_heads=1, block_size=16, head_dim=64, dtype="float32")
GIB = 1 << 30


def fake_root(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_kernel_tells_what_is_free(tmp_path: Path) -> None:
    root = fake_root(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB\n"})
    assert available_bytes(root) == 2048 * 1024


@pytest.mark.parametrize(
    ("folder", "limit", "use", "cache"),
    [
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_container_has_what_is_left_of_its_limit(
    tmp_path: Path, folder: str, limit: str, use: str, cache: str
) -> None:
    files = {
        "proc/meminfo": "MemAvailable: 2048 kB\n",
        f"{folder}/{limit}": "1000000\n",
        f"{folder}/{use}": "700000\n",
        f"{folder}/memory.stat": f"anon 5\n{cache} 200000\n",
    }
    assert available_bytes(fake_root(tmp_path, files)) == 500_000
    (tmp_path / folder / limit).write_text("max\n")
    assert available_bytes(tmp_path) == 2048 * 1024


def test_where_nothing_tells_it_is_the_machines_memory(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) >= available_bytes()


@pytest.fixture
def device_pool() -> KvPool:
    return KvPool(LAYOUT, "host-memory-test", torch.device("cpu"))


@pytest.mark.parametrize(
    ("share", "free_blocks", "expected"),
    [(0.25, 400, 100), (0.25, 100_000, 2000), (0.25, 3, 0), (0.0, 400, 0)],
)
def test_a_share_of_what_is_free_bounds_it_and_the_device_pool(
    device_pool: KvPool, monkeypatch: pytest.MonkeyPatch, share: float, free_blocks: int, expected: int
) -> None:
    monkeypatch.setattr(kv_pool, "available_bytes", lambda: free_blocks * LAYOUT.block_bytes)
    pool = host_pool(SwapConfig(host_share=share), device_pool)
    assert (0 if pool is None else pool.layout.blocks) == expected


def shared_memory_bytes() -> int:
    """What this process has of shared memory right now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssShmem" in line)
    return int(line.split()[1]) * 1024


def test_only_what_is_used_takes_memory_unless_it_was_asked_for(device_pool: KvPool) -> None:
    before = shared_memory_bytes()
    lazy = host_pool(SwapConfig(), device_pool)
    assert lazy is not None and lazy.layout.blocks == 2000
    probed = kv_pool.PROBED_BLOCKS * LAYOUT.block_bytes
    assert probed <= shared_memory_bytes() - before < probed + (4 << 20)
    lazy.bytes_view()[1000:1100] = 7
    assert shared_memory_bytes() - before >= probed + 100 * LAYOUT.block_bytes
    asked = host_pool(SwapConfig(host_blocks=2000), device_pool)
    assert asked is not None and shared_memory_bytes() - before > 2000 * LAYOUT.block_bytes
