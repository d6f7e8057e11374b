"""Learning where a backend keeps its KV, from backends made up for it, and copying in and out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import KvLayout
from llumnix.instance import vllm_layout
from llumnix.instance.kv_pool import KvPool
from llumnix.instance.vllm_layout import BlockShape, KvCopier, learn_packing

LAYERS, BLOCKS, SIZE, HEADS, DIM = 3, 6, 32, 3, 64
SHAPE = BlockShape(BLOCKS, SIZE, HEADS, DIM)

Place = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
"""The keys and values of one token in a layer, as views ``[heads, dim]``."""


def head_major(layer: Tensor, block: int, token: int) -> tuple[Tensor, Tensor]:
    """Keys transposed within a head's half of a block, values plain: vLLM on a CPU in float32."""
    halves = layer[block].view(HEADS, 2, SIZE * DIM)
    return halves[:, 0].view(HEADS, DIM, SIZE)[:, :, token], halves[:, 1].view(HEADS, SIZE, DIM)[:, token]


def paired(layer: Tensor, block: int, token: int) -> tuple[Tensor, Tensor]:
    """Keys in pairs of dimensions for 16 tokens, as matrix units want them; values in pairs of tokens."""
    halves = layer[block].view(HEADS, 2, SIZE * DIM)
    keys = halves[:, 0].view(HEADS, SIZE // 16, DIM // 2, 16, 2)[:, token // 16, :, token % 16]
    values = halves[:, 1].view(HEADS, DIM // 16, SIZE // 2, 16, 2)[:, :, token // 2, :, token % 2]
    return keys, values


def token_major(layer: Tensor, block: int, token: int) -> tuple[Tensor, Tensor]:
    """``[2, blocks, tokens, heads, dim]``: vLLM on a GPU."""
    return layer[0, block, token], layer[1, block, token]


def layers_of(place: Place, dtype: torch.dtype) -> list[Tensor]:
    """All layers in one storage, as vLLM allocates them, so that each begins elsewhere."""
    per_block = HEADS * SIZE * 2 * DIM
    storage = torch.zeros(LAYERS, BLOCKS * per_block, dtype=dtype)
    if place is token_major:
        return [layer.view(2, BLOCKS, SIZE, HEADS, DIM) for layer in storage]
    return [layer.view(BLOCKS, HEADS, SIZE, 2 * DIM) for layer in storage]


def write(layer: Tensor, place: Place, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    for row, slot in enumerate(slots.tolist()):
        to_keys, to_values = place(layer, slot // SIZE, slot % SIZE)
        to_keys.copy_(keys[row].view(to_keys.shape))
        to_values.copy_(values[row].view(to_values.shape))


def copier_of(layers: list[Tensor], place: Place) -> KvCopier:
    packings = learn_packing(layers[0], SHAPE, lambda k, v, slots: write(layers[0], place, k, v, slots))
    assert not layers[0].any()
    return KvCopier(layers, packings, SHAPE)


def pool_of(dtype: str, block_size: int, blocks: int) -> KvPool:
    return KvPool(KvLayout(blocks, LAYERS, HEADS, block_size, DIM, dtype), "layout-test", torch.device("cpu"))


@pytest.mark.parametrize("place", [head_major, paired, token_major])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layer_is_copied_out_in_our_order_and_back_in(place: Place, dtype: str) -> None:
    layers = layers_of(place, getattr(torch, dtype))
    copier = copier_of(layers, place)
    tokens, blocks = 75, (4, 0, 2)
    keys = torch.randn(LAYERS, tokens, HEADS, DIM).to(layers[0].dtype)
    values = torch.randn(LAYERS, tokens, HEADS, DIM).to(layers[0].dtype)
    slots = torch.tensor([blocks[n // SIZE] * SIZE + n % SIZE for n in range(tokens)])
    for number, layer in enumerate(layers):
        write(layer, place, keys[number], values[number], slots)
    pool = pool_of(dtype, 16, 8)
    order = (7, 1, 3, 2, 0)
    copier.copy_out(pool, blocks, order, first=0, end=48)
    copier.copy_out(pool, blocks, order, first=48, end=tokens)
    for token in range(tokens):
        there = pool.tensor[order[token // 16], :, :, :, token % 16]
        assert torch.equal(there, torch.stack((keys[:, token], values[:, token]), dim=1))
    elsewhere = layers_of(place, getattr(torch, dtype))
    target = copier_of(elsewhere, place)
    target.copy_in(pool, order, (1, 5, 3), first=SIZE, end=tokens)
    for number, layer in enumerate(elsewhere):
        for token in range(SIZE, tokens):
            found = place(layer, (1, 5, 3)[token // SIZE], token % SIZE)
            assert torch.equal(found[0].reshape(HEADS, DIM), keys[number, token])
            assert torch.equal(found[1].reshape(HEADS, DIM), values[number, token])
        assert not any(part.any() for part in place(layer, 1, 0)), "what the target has is not written"
    pool.close()


def apart(layers: list[Tensor]) -> list[Tensor]:
    """Each in memory of its own."""
    return [layer.clone() for layer in layers]


def two_and_one(layers: list[Tensor]) -> list[Tensor]:
    return [*layers[:2], layers[2].clone()]


def backwards(layers: list[Tensor]) -> list[Tensor]:
    return layers[::-1]


@pytest.mark.parametrize("allocated", [apart, two_and_one, backwards])
@pytest.mark.parametrize(("pass_elements", "runs_max"), [(1 << 20, 32), (1, 32), (2 * HEADS * DIM * 96, 1)])
def test_layers_may_lie_anywhere_and_are_copied_in_any_portions(
    allocated: Callable[[list[Tensor]], list[Tensor]],
    pass_elements: int,
    runs_max: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_layout, "PASS_ELEMENTS", pass_elements)
    monkeypatch.setattr(vllm_layout, "RUNS_MAX", runs_max)
    layers = allocated(layers_of(head_major, torch.float32))
    copier = copier_of(layers, head_major)
    for layer in layers:
        layer.normal_()
    pool, order, tokens = pool_of("float32", 16, 8), (2, 3, 7, 0, 1), 75
    copier.copy_out(pool, (4, 0, 1), order, first=0, end=tokens)
    for number, layer in enumerate(layers):
        for token in range(tokens):
            keys, values = head_major(layer, (4, 0, 1)[token // SIZE], token % SIZE)
            there = pool.tensor[order[token // 16], number, :, :, token % 16]
            assert torch.equal(there, torch.stack((keys, values)))
    before = [layer[[4, 0, 1]].clone() for layer in layers]
    copier.copy_in(pool, order, (5, 2, 3), first=0, end=tokens)
    pool.tensor.zero_()
    copier.copy_out(pool, (5, 2, 3), order, first=0, end=tokens)
    copier.copy_in(pool, order, (0, 1, 2), first=0, end=tokens)
    for layer, was in zip(layers, before):
        assert torch.equal(layer[:2], was[:2])
    pool.close()


def test_pool_blocks_may_be_larger_than_vllms() -> None:
    layers = layers_of(token_major, torch.float32)
    copier = copier_of(layers, token_major)
    for layer in layers:
        layer.copy_(torch.randn(layer.shape))
    before = [layer.clone() for layer in layers]
    pool = pool_of("float32", 64, 2)
    copier.copy_out(pool, (0, 1, 2), (1, 0), first=0, end=90)
    for layer in layers:
        layer[:, :3] = 0
    copier.copy_in(pool, (1, 0), (0, 1, 2), first=0, end=90)
    for layer, was in zip(layers, before):
        assert torch.equal(layer[:, :2], was[:, :2])
        assert torch.equal(layer[:, 2, : 90 - 64], was[:, 2, : 90 - 64])
    pool.close()


def test_a_layout_that_is_not_strided_is_refused() -> None:
    layers = layers_of(token_major, torch.float32)

    def shuffled(layer: Tensor, block: int, token: int) -> tuple[Tensor, Tensor]:
        return token_major(layer, block, token * token % SIZE if token % 3 == 0 else token)

    with pytest.raises(ConfigurationError, match="cannot be followed"):
        copier_of(layers, shuffled)


def test_kv_without_an_axis_of_blocks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no axis of 6 blocks"):
        learn_packing(torch.zeros(4, 5), SHAPE, lambda k, v, slots: None)
