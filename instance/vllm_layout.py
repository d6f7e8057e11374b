"""Where vLLM keeps the keys and values of a token, and copying between there and a pool in our own layout.

Every attention backend of vLLM packs its KV blocks in its own way, some for the processor's matrix units.
Nothing of that is written down here: at start the backend's own write operation is asked to write numbered
elements into one block, and where they turn up is the layout. All backends seen so far are strided: each
index (head, token, dimension) splits into factors with a stride each. A layout that is not is refused.

Made and called by the connector (vllm_connector.py), and by the copy thread of vllm_staging.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import KvLayout

DIGIT: Final = 128  # numbers below it are exact in every format of KV that is taken here

Write = Callable[[Tensor, Tensor, Tensor], None]
"""Have vLLM write keys and values ``[tokens, kv_heads, head_dim]`` to slots ``[tokens]`` of one layer."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What vLLM says of its blocks: how many, and what each holds per layer."""

    blocks: int
    block_size: int
    kv_heads: int
    head_dim: int


Factors = tuple[tuple[int, int], ...]
"""An index as (size, stride) of its factors, slowest first."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Keys, or values, of a layer: where they begin in it, the strides of blocks and heads, and how tokens
    and dimensions lie within. Strides and offsets in elements; all layers are alike."""

    offset: int
    block_stride: int
    head_stride: int
    tokens: Factors
    dims: Factors

    def view(self, layer: Tensor, shape: BlockShape) -> Tensor:
        """The layer as ``[blocks, kv_heads, *token factors, *dimension factors]``."""
        inner = (*self.tokens, *self.dims)
        sizes = (shape.blocks, shape.kv_heads, *(size for size, _ in inner))
        strides = (self.block_stride, self.head_stride, *(stride for _, stride in inner))
        return layer.as_strided(sizes, strides, int(layer.storage_offset()) + self.offset)


def learn_packing(layer: Tensor, shape: BlockShape, write: Write) -> tuple[Packing, Packing]:
    """How keys and values lie in a layer. Its last block is written to and zeroed again. Raises
    ConfigurationError for a layout that is not strided."""
    if shape.blocks not in layer.shape:
        raise ConfigurationError(
            f"vLLM's KV of shape {tuple(layer.shape)} has no axis of {shape.blocks} blocks"
        )
    axis = list(layer.shape).index(shape.blocks)
    probe = layer.select(axis, shape.blocks - 1)
    offsets = torch.zeros(probe.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(probe.shape, probe.stride())):
        offsets += (torch.arange(size) * stride).view([-1 if d == dim else 1 for d in range(probe.dim())])
    count = 2 * shape.block_size * shape.kv_heads * shape.head_dim
    if probe.numel() != count:
        raise ConfigurationError(f"vLLM's KV blocks hold {probe.numel()} elements a layer, expected {count}")
    numbers = _numbers_written(layer, probe, shape, write)
    places = torch.full((count,), -1, dtype=torch.int64)
    inside = (numbers >= 0) & (numbers < count)
    places[numbers[inside]] = offsets.flatten()[inside]
    keys, values = places.view(2, shape.block_size, shape.kv_heads, shape.head_dim)
    stride = layer.stride(axis)
    return _packing(keys, stride), _packing(values, stride)


def _numbers_written(layer: Tensor, probe: Tensor, shape: BlockShape, write: Write) -> Tensor:
    """Which number each element of the probed block got, in the block's own order."""
    tokens = (shape.block_size, shape.kv_heads, shape.head_dim)
    numbers = torch.arange(2 * torch.Size(tokens).numel()).view(2, *tokens)
    slots = torch.arange(shape.block_size, device=layer.device) + (shape.blocks - 1) * shape.block_size
    seen = torch.zeros(probe.numel(), dtype=torch.int64)
    scale = 1
    while scale < numbers.numel():
        digits = (numbers // scale % DIGIT).to(layer.dtype).to(layer.device)
        write(digits[0].contiguous(), digits[1].contiguous(), slots)
        seen += probe.flatten().to(torch.float32).cpu().round().to(torch.int64) * scale
        scale *= DIGIT
    probe.zero_()
    return seen


def _packing(places: Tensor, block_stride: int) -> Packing:
    """``places[token, head, dim]`` as strides, checked against every element."""
    origin = int(places[0, 0, 0])
    heads = _factors(places[0, :, 0] - origin)
    tokens, dims = _factors(places[:, 0, 0] - origin), _factors(places[0, 0, :] - origin)
    expected = (
        origin
        + _offsets(tokens).view(-1, 1, 1)
        + _offsets(heads).view(1, -1, 1)
        + _offsets(dims).view(1, 1, -1)
    )
    if len(heads) != 1 or not bool((expected == places).all()):
        raise ConfigurationError("vLLM's attention backend packs KV in a way that cannot be followed")
    return Packing(origin, block_stride, heads[0][1], tokens, dims)


def _factors(places: Tensor) -> Factors:
    """A one-dimensional list of offsets from 0 as nested strides, as far as it can be one."""
    left, found = places.tolist(), []
    while len(left) > 1:
        stride = left[1]
        run = 1
        while run < len(left) and left[run] == run * stride:
            run += 1
        if len(left) % run:
            break
        found.append((run, stride))
        left = left[::run]
    return tuple(reversed(found)) or ((1, 0),)


def _offsets(factors: Factors) -> Tensor:
    """The offset of each value of an index."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in factors:
        offsets = (offsets.view(-1, 1) + (torch.arange(size) * stride).view(1, -1)).flatten()
    return offsets


class PoolTensor(Protocol):
    """A pool, or a part of its heads: ``tensor`` is ``[blocks, layers, 2, heads, block_size, head_dim]``."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def tensor(self) -> Tensor: ...


class KvCopier:
    """A BlockCopier (vllm_exchange.py) between layers of this process and as many heads of a pool."""

    def __init__(
        self, layers: Sequence[Tensor], packings: tuple[Packing, Packing], shape: BlockShape
    ) -> None:
        self.shape = shape
        self._views = [tuple(packing.view(layer, shape) for packing in packings) for layer in layers]

    def copy_out(
        self, pool: PoolTensor, blocks: Sequence[int], pool_blocks: Sequence[int], *, first: int, end: int
    ) -> None:
        """See BlockCopier."""
        shape, size = self.shape, pool.layout.block_size
        source = _ids(blocks[first // shape.block_size : -(-end // shape.block_size)], self._device)
        target = _ids(pool_blocks[first // size : -(-end // size)], pool.tensor.device)
        skip = first % shape.block_size
        room = len(target) * size
        for layer, views in enumerate(self._views):
            for side, view in enumerate(views):
                tokens = view[source].reshape(len(source), shape.kv_heads, shape.block_size, shape.head_dim)
                tokens = tokens.transpose(0, 1).reshape(shape.kv_heads, -1, shape.head_dim)
                tokens = _fit(tokens[:, skip:], room)
                tokens = tokens.view(shape.kv_heads, len(target), size, shape.head_dim).transpose(0, 1)
                pool.tensor[target, layer, side] = tokens.to(pool.tensor.device)

    def copy_in(
        self, pool: PoolTensor, pool_blocks: Sequence[int], blocks: Sequence[int], *, first: int, end: int
    ) -> None:
        """See BlockCopier. Returns once the device has it."""
        shape, size = self.shape, pool.layout.block_size
        source = _ids(pool_blocks[first // size : -(-end // size)], pool.tensor.device)
        target = _ids(blocks[first // shape.block_size : -(-end // shape.block_size)], self._device)
        skip = first % size
        room = len(target) * shape.block_size
        for layer, views in enumerate(self._views):
            for side, view in enumerate(views):
                tokens = pool.tensor[source, layer, side].transpose(0, 1)
                tokens = tokens.reshape(shape.kv_heads, -1, shape.head_dim)
                tokens = _fit(tokens[:, skip:], room)
                tokens = tokens.view(shape.kv_heads, len(target), *view.shape[2:]).transpose(0, 1)
                view[target] = tokens.to(view.device)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @property
    def _device(self) -> torch.device:
        return self._views[0][0].device


def _ids(blocks: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(blocks, dtype=torch.int64, device=device)


def _fit(tokens: Tensor, room: int) -> Tensor:
    """``[heads, tokens, dims]`` cut or padded with zeros to ``room`` tokens, contiguous."""
    missing = room - tokens.shape[1]
    if missing > 0:
        return torch.nn.functional.pad(tokens, (0, 0, 0, missing))
    return tokens[:, :room].contiguous()
