"""Where vLLM keeps the keys and values of a token, and copying between there and a pool in our own layout.

Every attention backend of vLLM packs its KV blocks in its own way, some for the processor's matrix units.
Nothing of that is written down here: at start the backend's own write operation is asked to write numbered
elements into one block, and where they turn up is the layout. All backends seen so far are strided: each
index (head, token, dimension) splits into factors with a stride each. A layout that is not is refused.

Made and called by the connector (vllm_connector.py), and by the copy thread of vllm_staging.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import KvLayout

PASS_ELEMENTS: Final = 1 << 20
"""Copied at a time: what lies in between stays in the processor's caches."""
RUNS_MAX: Final = 32
"""Of consecutive blocks, written one after the other; more are written by number."""
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

    def view(self, layer: Tensor, shape: BlockShape, layers: int, spacing: int) -> Tensor:
        """A layer and those that follow it in memory, ``spacing`` elements apart, as ``[blocks, layers,
        kv_heads, *token factors, *dimension factors]``."""
        inner = (*self.tokens, *self.dims)
        sizes = (shape.blocks, layers, shape.kv_heads, *(size for size, _ in inner))
        strides = (self.block_stride, spacing, self.head_stride, *(stride for _, stride in inner))
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
    """A BlockCopier (vllm_exchange.py) between layers of this process and as many heads of a pool.

    Blocks are taken and put as they lie, whole, and brought into the other side's order in between: copying
    from one strided place to another element by element is several times slower. Layers at equal distances
    in one memory, as vLLM allocates them, are copied together as long as that is little."""

    def __init__(
        self, layers: Sequence[Tensor], packings: tuple[Packing, Packing], shape: BlockShape
    ) -> None:
        self.shape = shape
        self._stretches = list(_stretches(layers))
        self._views = [
            tuple(packing.view(layers[first], shape, count, spacing) for packing in packings)
            for first, count, spacing in self._stretches
        ]
        self._as_they_lie = [_from_slowest(view) for view in self._views[0]]

    def copy_out(
        self, pool: PoolTensor, blocks: Sequence[int], pool_blocks: Sequence[int], *, first: int, end: int
    ) -> None:
        """See BlockCopier."""
        shape, size = self.shape, pool.layout.block_size
        source = _Places(blocks[first // shape.block_size : -(-end // shape.block_size)], self._device)
        target = _Places(pool_blocks[first // size : -(-end // size)], pool.tensor.device)
        skip, room = first % shape.block_size, target.count * size
        for view, axes, part in self._parts(pool, source.count * shape.block_size):
            found = source.take(view.permute(axes)).permute(_back(axes)).movedim(0, 2)
            tokens = found.reshape(view.shape[1], shape.kv_heads, -1, shape.head_dim)
            tokens = _fit(tokens[:, :, skip:], room)
            tokens = tokens.view(*tokens.shape[:2], target.count, size, shape.head_dim)
            target.put(part, tokens.movedim(2, 0).to(part.device))

    def copy_in(
        self, pool: PoolTensor, pool_blocks: Sequence[int], blocks: Sequence[int], *, first: int, end: int
    ) -> None:
        """See BlockCopier. Returns once the device has it."""
        shape, size = self.shape, pool.layout.block_size
        source = _Places(pool_blocks[first // size : -(-end // size)], pool.tensor.device)
        target = _Places(blocks[first // shape.block_size : -(-end // shape.block_size)], self._device)
        skip, room = first % size, target.count * shape.block_size
        for view, axes, part in self._parts(pool, source.count * size):
            found = source.take(part).movedim(0, 2)
            tokens = found.reshape(view.shape[1], shape.kv_heads, -1, shape.head_dim)
            tokens = _fit(tokens[:, :, skip:], room).to(view.device)
            tokens = tokens.reshape(view.shape[1], shape.kv_heads, target.count, *view.shape[3:])
            target.put(view.permute(axes), tokens.movedim(2, 0).permute(axes))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _parts(self, pool: PoolTensor, tokens: int) -> Iterator[tuple[Tensor, tuple[int, ...], Tensor]]:
        """What is copied at a time, so many tokens of it: keys or values of some layers, ``[blocks, layers,
        kv_heads, …]``, how those lie, and the same in the pool."""
        most = max(1, PASS_ELEMENTS // (tokens * self.shape.kv_heads * self.shape.head_dim))
        for (first, count, _), views in zip(self._stretches, self._views):
            for layer in range(0, count, most):
                some = min(most, count - layer)
                for side, (view, axes) in enumerate(zip(views, self._as_they_lie)):
                    theirs = pool.tensor[:, first + layer : first + layer + some, side]
                    yield view.narrow(1, layer, some), axes, theirs

    @property
    def _device(self) -> torch.device:
        return self._views[0][0].device


class _Places:
    """Where blocks are among those of a tensor: in a few runs, as they mostly are, or by number."""

    def __init__(self, blocks: Sequence[int], device: torch.device) -> None:
        self.count = len(blocks)
        begins = [at for at in range(len(blocks)) if at == 0 or blocks[at] != blocks[at - 1] + 1]
        self._runs = [(blocks[at], at, end - at) for at, end in zip(begins, [*begins[1:], len(blocks)])]
        self._numbers = torch.tensor(blocks, dtype=torch.int64, device=device)

    def take(self, every: Tensor) -> Tensor:
        """These of all blocks: the memory itself or a copy."""
        if len(self._runs) == 1:
            return every.narrow(0, self._runs[0][0], self.count)
        return every.index_select(0, self._numbers)

    def put(self, every: Tensor, found: Tensor) -> None:
        """Write these of all blocks."""
        if len(self._runs) > RUNS_MAX:
            every.index_copy_(0, self._numbers, found)
            return
        for block, at, count in self._runs:
            every.narrow(0, block, count).copy_(found.narrow(0, at, count))


def _stretches(layers: Sequence[Tensor]) -> Iterator[tuple[int, int, int]]:
    """Layers at equal distances in one memory: the first, how many, and elements between two of them."""
    first = 0
    while first < len(layers):
        places = [_place(layer) for layer in layers[first : first + 2]]
        same = len(places) == 2 and places[0][0] == places[1][0]
        spacing = max(0, places[1][1] - places[0][1]) if same else 0
        count = 1
        while spacing and first + count < len(layers):
            memory, begin = _place(layers[first + count])
            if (memory, begin) != (places[0][0], places[0][1] + count * spacing):
                break
            count += 1
        yield first, count, spacing
        first += count


def _place(layer: Tensor) -> tuple[int, int]:
    """Which memory a layer lies in, and where it begins there."""
    return layer.untyped_storage().data_ptr(), int(layer.storage_offset())


def _from_slowest(view: Tensor) -> tuple[int, ...]:
    """The axes of a view, blocks and layers first and the others as they lie in memory."""
    return (0, 1, *sorted(range(2, view.dim()), key=lambda axis: -view.stride()[axis]))


def _back(axes: tuple[int, ...]) -> tuple[int, ...]:
    """What undoes a permutation."""
    return tuple(axes.index(axis) for axis in range(len(axes)))


def _fit(tokens: Tensor, room: int) -> Tensor:
    """``[layers, heads, tokens, dims]`` cut or padded with zeros to ``room`` tokens."""
    missing = room - tokens.shape[2]
    return torch.nn.functional.pad(tokens, (0, 0, 0, missing)) if missing > 0 else tokens[:, :, :room]
