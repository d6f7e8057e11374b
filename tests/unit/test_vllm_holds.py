"""What a migration does not move because its target has it: blocks of vLLM held on both sides, and a staging
pool that need not have them. Over made-up KV and a block pool that counts as vLLM's does, without vLLM."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llumnix.core.messages.control import KvLayout
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.vllm_arrivals import Arrivals
from llumnix.instance.vllm_exchange import Exchange
from llumnix.instance.vllm_holds import Holds
from llumnix.instance.vllm_layout import BlockShape, KvCopier, Packing
from llumnix.instance.vllm_staging import Staging

SIZE, VLLM_SIZE, DIM = 16, 32, 8
BLOCKS = 12


@dataclass(eq=False)
class Block:
    block_id: int
    ref_cnt: int = 0


@dataclass
class BlockPool:
    """As much of vLLM's as is used, by the same names."""

    blocks: list[Block] = field(default_factory=lambda: [Block(number) for number in range(BLOCKS)])
    cached: dict[str, Block] = field(default_factory=dict)
    freed: list[int] = field(default_factory=list)
    enable_caching: bool = True

    def get_num_free_blocks(self) -> int:
        return sum(block.ref_cnt == 0 for block in self.blocks)

    def get_new_blocks(self, count: int) -> list[Block]:
        free = [block for block in self.blocks if block.ref_cnt == 0]
        new = [block for block in free if block not in self.cached.values()][:count]
        assert len(new) == count
        self.touch(new)
        return new

    def touch(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0
            self.freed += [block.block_id] if block.ref_cnt == 0 else []

    def get_cached_block(self, block_hash: str, groups: list[int]) -> list[Block] | None:
        found = self.cached.get(block_hash)
        return None if found is None else [found]

    def cache_full_blocks(
        self, live: Any, blocks: list[Block], cached: int, full: int, size: int, group: int
    ) -> None:
        assert size == VLLM_SIZE
        self.cached |= dict(zip(live.block_hashes[cached:full], blocks[cached:full], strict=True))


class Instance:
    """The parts of an engine that deal with KV; ``layer`` is ``[blocks, tokens, keys and values, dim]``."""

    def __init__(self, pool_blocks: int) -> None:
        self.pool = BlockPool()
        self.exchange = Exchange(
            lambda layout: KvPool(layout, "holds", torch.device("cpu")),
            block_pool=self.pool,
            free_blocks=self.pool.get_num_free_blocks,
        )
        self.layer = torch.zeros(BLOCKS, VLLM_SIZE, 2, DIM)
        tokens, dims = ((VLLM_SIZE, 2 * DIM),), ((DIM, 1),)
        halves = [Packing(at, VLLM_SIZE * 2 * DIM, 1, tokens, dims) for at in (0, DIM)]
        shape = BlockShape(BLOCKS, VLLM_SIZE, 1, DIM)
        layout = KvLayout(pool_blocks, 1, 1, SIZE, DIM, "float32")
        self.exchange.know(layout, KvCopier([self.layer], (halves[0], halves[1]), shape))
        self.holds = Holds(self.exchange)
        self.arrivals = Arrivals(self.exchange, self.holds)
        self.staging = Staging(self.exchange)


@pytest.fixture
def instance() -> Iterator[Instance]:
    made = Instance(pool_blocks=6)
    yield made
    made.staging.close()
    made.exchange.pool.close()


def test_a_hold_counts_where_no_request_has_the_block(instance: Instance) -> None:
    pool, holds = instance.pool, instance.holds
    mine = pool.blocks[2:5]
    pool.touch(mine[:1])  # as a request of vLLM does
    one, other = holds.hold(mine), holds.hold(mine[:2])
    assert [block.ref_cnt for block in mine] == [3, 2, 1] and holds.alone == 2
    holds.let_go(one)
    holds.let_go(one)
    assert [block.ref_cnt for block in mine] == [2, 1, 0] and holds.alone == 1
    assert one.blocks == [] and pool.freed == [4]
    pool.free_blocks(mine[:1])
    assert holds.alone == 2
    holds.let_all_go()
    assert pool.freed == [4, 3, 2] and other.blocks == [] and holds.alone == 0


def test_what_the_target_has_is_neither_copied_nor_needs_room(instance: Instance) -> None:
    staging, kept, computed = instance.staging, 64, 64 + 75
    kv = torch.randn(5 * VLLM_SIZE, 2, DIM)
    order = (7, 3, 8, 1, 5)
    for place, block in enumerate(order):
        instance.layer[block] = kv[place * VLLM_SIZE : (place + 1) * VLLM_SIZE]
    instance.exchange.blocks_of = lambda vllm_id: order
    assert not staging.begin("r", 0, computed)
    assert staging.begin("r", kept, computed)
    assert staging.began_at("r") == kept
    blocks, copied = staging.copied("r", "v", 120) or ((), 0)
    assert len(blocks) == 4 and copied in (kept, 112)
    last = staging.finish("r", "v", computed)
    assert last[:4] == blocks and len(last) == 5
    tensor = instance.exchange.pool.tensor[list(last), 0, :, 0]  # blocks, 2, tokens, dim
    assert torch.equal(tensor.transpose(1, 2).reshape(-1, 2, DIM)[:75], kv[kept:computed])
    assert staging.blocks.owned_blocks == 5
    staging.stop("r")
    assert staging.blocks.owned_blocks == 0


def hashes(count: int) -> list[str]:
    return [f"hash {number}" for number in range(count)]


def test_an_arrival_begins_behind_what_is_present(instance: Instance) -> None:
    pool, arrivals = instance.pool, instance.arrivals
    pool.cached = dict(zip(hashes(2), pool.blocks[4:6], strict=True))
    assert arrivals.begin("m", hashes(4), keep_blocks=0) == 4
    assert (arrivals.present("m"), arrivals.present_tokens, instance.holds.alone) == (64, 64, 2)
    reserved = (5, 0, 3)
    arrivals.hold("m", reserved, keep_blocks=0)
    assert arrivals.blocks == 1
    kv = torch.randn(3 * SIZE, 2, DIM)
    for place, block in enumerate(reserved):
        part = kv[place * SIZE : (place + 1) * SIZE]
        instance.exchange.pool.tensor[block, 0, :, 0] = part.transpose(0, 1)
    arrivals.load(reserved[:2], full=True)
    hold = arrivals.join("m", 64 + 40, SimpleNamespace(block_hashes=hashes(4)))
    assert pool.cached.keys() == set(hashes(3))
    assert torch.equal(instance.layer[pool.cached["hash 2"].block_id], kv[:VLLM_SIZE])
    assert [block.ref_cnt for block in pool.cached.values()] == [1, 1, 0]
    instance.holds.let_go(hold)
    assert pool.get_num_free_blocks() == BLOCKS and arrivals.present_tokens == 0


def test_an_arrival_that_lost_what_was_present_is_told_so(instance: Instance) -> None:
    pool, arrivals = instance.pool, instance.arrivals
    pool.cached = {"hash 0": pool.blocks[4]}
    assert arrivals.begin("m", hashes(3), keep_blocks=0) == 2
    arrivals.hold("m", (0, 1, 2, 3), keep_blocks=0)
    assert arrivals.intact("m") and arrivals.intact("another")
    arrivals.yield_blocks()
    assert arrivals.blocks == 0 and arrivals.intact("m")
    instance.holds.let_all_go()
    assert not arrivals.intact("m") and arrivals.present("m") == 32
    arrivals.let_go("m")
    assert pool.get_num_free_blocks() == BLOCKS and arrivals.present("m") == 0


def test_holding_what_is_present_leaves_others_room(instance: Instance) -> None:
    pool, arrivals = instance.pool, instance.arrivals
    pool.cached = dict(zip(hashes(3), pool.blocks, strict=False))
    pool.touch(pool.blocks[:1])  # a request has this one: holding it takes nothing
    assert arrivals.begin("m", hashes(3), keep_blocks=BLOCKS - 2) == 4
    assert [block.ref_cnt for block in pool.blocks[:3]] == [2, 1, 0]
