"""The C kernels behind the Kernels interface. Chosen by ``ops`` on a CPU when the library could be built.

Activations are float32; weights and KV keep their format. Where the processor multiplies bfloat16 (AMX,
AVX-512), the inputs of products with bfloat16 weights are rounded to it, as on a GPU; elsewhere weights are
widened in registers. A row's result never depends on the other rows, on the number of threads, or on whether
it was decoded or prefilled: see linear.c, linear_bf16.c and attention.c. The C code runs without the
interpreter's lock and with as many threads as torch is set to use.
"""

import ctypes
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional

from llumnix.kernels.cpu.huge_pages import Arena
from llumnix.kernels.interface import Linear
from llumnix.kernels.reference import ReferenceKernels

PANEL = 16
CHUNK = 32  # inputs of one tile; see linear_bf16.c
LANES = 8
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# What becomes of a product; mirrors ``enum finish`` of linear.h.
WRITE, ADD, SILU_MUL = range(3)


class Product(IntEnum):
    """How weights are multiplied, from slow to fast; mirrors ``enum product`` of linear.h. What is not
    bfloat16 is always WIDENED."""

    WIDENED = 0
    AVX512_BF16 = 1
    AMX_BF16 = 2


@dataclass(frozen=True, slots=True, eq=False)
class CpuLinear(Linear):
    """With what each call hands to C: at a few hundred calls a step, looking it up anew would show."""

    weight_pointer: int = 0
    bias_pointer: int | None = None
    format: int = 0
    product: Product = Product.WIDENED


class CpuKernels:
    """See Kernels for the contracts. ``product`` is the fastest way of multiplying bfloat16 that is used; the
    machine must have it. By default the best it has."""

    def __init__(self, library: ctypes.CDLL, product: Product | None = None) -> None:
        best = Product(library.llumnix_best_product())
        self.product = best if product is None else product
        if self.product > best:
            raise ValueError(f"this machine has no {self.product.name}")
        self._linear = library.llumnix_linear
        self._packed_rows = library.llumnix_packed_rows
        self._attention = library.llumnix_attention
        self._rms_norm = library.llumnix_rms_norm
        self._rope = library.llumnix_rope
        self._write_kv = library.llumnix_write_kv
        self._gather = library.llumnix_gather_blocks
        self._scatter = library.llumnix_scatter_blocks
        self._reference = ReferenceKernels()
        self._arena = Arena()

    def write_kv(self, pool: Tensor, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        _, _, _, kv_heads, block_size, head_dim = pool.shape
        strides, item_bytes = pool.stride(), pool.element_size()
        target = pool.data_ptr() + layer * strides[1] * item_bytes
        keys, values = _heads(keys), _heads(values)
        self._write_kv(
            target,
            target + strides[2] * item_bytes,
            keys.data_ptr(),
            values.data_ptr(),
            slots.data_ptr(),
            keys.shape[0],
            keys.stride(0),
            values.stride(0),
            strides[0],
            kv_heads,
            block_size,
            head_dim,
            FORMATS[pool.dtype],
            torch.get_num_threads(),
        )

    def decode_attention(
        self,
        query: Tensor,
        pool: Tensor,
        layer: int,
        block_tables: Tensor,
        context_lens: Tensor,
        scale: float,
    ) -> Tensor:
        if not _fits(pool):
            return self._reference.decode_attention(query, pool, layer, block_tables, context_lens, scale)
        return self._attend(query, pool, layer, block_tables, context_lens, -1, scale)

    def prefill_attention(
        self, query: Tensor, pool: Tensor, layer: int, block_table: Tensor, start: int, scale: float
    ) -> Tensor:
        if not _fits(pool):
            return self._reference.prefill_attention(query, pool, layer, block_table, start, scale)
        return self._attend(query, pool, layer, block_table, None, start, scale)

    def _attend(
        self,
        query: Tensor,
        pool: Tensor,
        layer: int,
        tables: Tensor,
        context_lens: Tensor | None,
        start: int,
        scale: float,
    ) -> Tensor:
        query = _heads(query)
        tokens, heads, head_dim = query.shape
        out = torch.empty(tokens, heads, head_dim)
        block_stride, layer_stride = pool.stride()[:2]
        failed = self._attention(
            out.data_ptr(),
            query.data_ptr(),
            pool.data_ptr() + layer * layer_stride * pool.element_size(),
            tables.data_ptr(),
            None if context_lens is None else context_lens.data_ptr(),
            tables.stride(0),
            tokens,
            start,
            block_stride,
            pool.shape[3],
            pool.shape[4],
            head_dim,
            heads,
            query.stride(0),
            scale,
            FORMATS[pool.dtype],
            self.product,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for attention scores")
        return out

    def gather_blocks(self, pool_bytes: Tensor, ids: Tensor, staging: Tensor) -> None:
        self._gather(staging.data_ptr(), pool_bytes.data_ptr(), ids.data_ptr(), len(ids), pool_bytes.shape[1])

    def scatter_blocks(self, staging: Tensor, ids: Tensor, pool_bytes: Tensor) -> None:
        self._scatter(
            pool_bytes.data_ptr(), staging.data_ptr(), ids.data_ptr(), len(ids), pool_bytes.shape[1]
        )

    def prepare_linear(self, weight: Tensor, bias: Tensor | None) -> CpuLinear:
        wide_bias = None if bias is None else bias.float().contiguous()
        return self._prepared(weight, None, wide_bias)

    def prepare_gated(self, gate: Tensor, up: Tensor) -> CpuLinear:
        return self._prepared(gate, up, None)

    def _prepared(self, weight: Tensor, up: Tensor | None, bias: Tensor | None) -> CpuLinear:
        product = self.product if weight.dtype == torch.bfloat16 else Product.WIDENED
        pack = _panels if product is Product.WIDENED else _strips
        data = self._arena.hold(pack(weight, up))
        return CpuLinear(
            data,
            bias,
            weight.shape[1],
            weight.shape[0],
            up is not None,
            weight_pointer=data.data_ptr(),
            bias_pointer=None if bias is None else bias.data_ptr(),
            format=FORMATS[data.dtype],
            product=product,
        )

    def linear(self, x: Tensor, prepared: Linear) -> Tensor:
        y = torch.empty(len(x), prepared.out_features)
        self._multiply(y, x, prepared, WRITE)
        return y

    def linear_add(self, x: Tensor, prepared: Linear, residual: Tensor) -> None:
        self._multiply(residual, x, prepared, ADD)

    def linear_silu_mul(self, x: Tensor, prepared: Linear) -> Tensor:
        y = torch.empty(len(x), prepared.out_features)
        self._multiply(y, x, prepared, SILU_MUL)
        return y

    def _multiply(self, y: Tensor, x: Tensor, prepared: Linear, finish: int) -> None:
        assert isinstance(prepared, CpuLinear)  # a Linear comes from the implementation that multiplies it
        x = x.contiguous()
        failed = self._linear(
            y.data_ptr(),
            x.data_ptr(),
            prepared.weight_pointer,
            prepared.bias_pointer,
            len(x),
            prepared.in_features,
            prepared.out_features,
            finish,
            prepared.format,
            prepared.product,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for {len(x)} rows of activations")

    def embedding(self, ids: Tensor, prepared: Linear) -> Tensor:
        out = torch.empty(len(ids), prepared.in_features)
        assert isinstance(prepared, CpuLinear)
        self._packed_rows(
            out.data_ptr(),
            prepared.weight_pointer,
            ids.data_ptr(),
            len(ids),
            prepared.in_features,
            prepared.format,
            prepared.product,
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        shape, strides = x.shape, x.stride()
        out = torch.empty(shape)
        heads = 1 if len(shape) == 2 else shape[1]
        self._rms_norm(
            out.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            shape[0],
            heads,
            shape[-1],
            strides[0],
            strides[1],
            eps,
            FORMATS[weight.dtype],
            torch.get_num_threads(),
        )
        return out

    def rope(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        tokens, heads, head_dim = query.shape
        self._rope(
            query.data_ptr(),
            key.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            positions.data_ptr(),
            tokens,
            heads,
            key.shape[1],
            head_dim,
            query.stride(0),
            key.stride(0),
            torch.get_num_threads(),
        )


def _fits(pool: Tensor) -> bool:
    """Whether attention.c handles this pool's shape; other shapes, in tests mostly, are left to torch."""
    block_size, head_dim = pool.shape[4:]
    return head_dim % LANES == 0 and block_size & (block_size - 1) == 0


def _heads(rows: Tensor) -> Tensor:
    """``[tokens, heads, head_dim]`` with its heads side by side, as the C code expects; usually as it is."""
    _, between_heads, within = rows.stride()
    return rows if within == 1 and between_heads == rows.shape[2] else rows.contiguous()


def _panels(weight: Tensor, up: Tensor | None) -> Tensor:
    """``[out, in]`` to ``[out / 16, in, 16]``, of two weights panel by panel in turn; zeros beyond the last
    output. See linear.c."""
    if up is not None:
        return torch.stack([_panels(weight, None), _panels(up, None)], dim=1)
    padded = functional.pad(weight, (0, 0, 0, -weight.shape[0] % PANEL))
    panels = padded.view(-1, PANEL, weight.shape[1]).transpose(1, 2)
    if weight.dtype == torch.bfloat16:
        halves = panels.reshape(-1, weight.shape[1], 2, LANES).transpose(2, 3)
        return halves.reshape(panels.shape)
    return panels.contiguous()


def _strips(weight: Tensor, up: Tensor | None) -> Tensor:
    """``[out, in]`` to ``[out / 32, in / 32, 2, 16, 16, 2]``, see linear_bf16.c; with ``up``, ``[out / 16,
    …]`` whose fourth-last dimension is gate and up."""
    rest = (-weight.shape[0] % (PANEL if up is not None else 2 * PANEL), -weight.shape[1] % CHUNK)
    parts = [weight] if up is None else [weight, up]
    panels = [
        functional.pad(part, (0, rest[1], 0, rest[0])).view(
            -1, 3 - len(parts), PANEL, (weight.shape[1] + rest[1]) // CHUNK, CHUNK // 2, 2
        )
        for part in parts
    ]
    return torch.cat(panels, dim=1).permute(0, 3, 1, 4, 2, 5).contiguous()
