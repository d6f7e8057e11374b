"""The Triton kernels behind the Kernels interface, and torch for what torch does well on a GPU: matrix
products, and prefill attention over gathered KV. Chosen by ``ops`` for CUDA tensors; the contract tests run
it on the CPU in Triton's interpreter.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional

from llumnix.kernels.gpu.attention import (
    HEAD_TILE_MIN,
    KEY_TILE,
    SPLIT_TOKENS,
    attend_part_program,
    join_parts_program,
)
from llumnix.kernels.gpu.blocks import copy_blocks_program, write_kv_program
from llumnix.kernels.gpu.elementwise import rms_norm_program, rope_program
from llumnix.kernels.interface import Linear
from llumnix.kernels.reference import ReferenceKernels

COPY_TILE = 1024
WORD_BYTES = 8


class TritonKernels(ReferenceKernels):
    """See Kernels for the contracts. What is not overridden is torch's own."""

    def write_kv(self, pool: Tensor, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        tokens, kv_heads, head_dim = keys.shape
        keys, values = _heads(keys.to(pool.dtype)), _heads(values.to(pool.dtype))
        write_kv_program[(tokens, kv_heads)](
            pool[0, layer],
            keys,
            values,
            slots,
            pool.stride(0),
            pool.stride(2),
            keys.stride(0),
            values.stride(0),
            pool.shape[4],
            HEAD_DIM=head_dim,
            DIM_TILE=triton.next_power_of_2(head_dim),
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
        query = _heads(query)
        batch, heads, head_dim = query.shape
        kv_heads, block_size = pool.shape[3], pool.shape[4]
        splits = triton.cdiv(block_tables.shape[1] * block_size, SPLIT_TOKENS)
        dim_tile = max(triton.next_power_of_2(head_dim), HEAD_TILE_MIN)
        parts = query.new_empty(batch, heads, splits, head_dim, dtype=torch.float32)
        log_sums = query.new_empty(batch, heads, splits, dtype=torch.float32)
        attend_part_program[(batch, kv_heads, splits)](
            parts,
            log_sums,
            query,
            pool[0, layer],
            block_tables,
            context_lens,
            scale,
            query.stride(0),
            pool.stride(0),
            pool.stride(2),
            block_tables.stride(0),
            block_size,
            SHARING=heads // kv_heads,
            HEAD_DIM=head_dim,
            HEAD_TILE=max(triton.next_power_of_2(heads // kv_heads), HEAD_TILE_MIN),
            DIM_TILE=dim_tile,
            KEY_TILE=KEY_TILE,
            SPLIT_TOKENS=SPLIT_TOKENS,
        )
        if splits == 1:
            return parts.view(batch, heads, head_dim).to(query.dtype)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        join_parts_program[(batch * heads,)](
            out,
            parts,
            log_sums,
            splits,
            HEAD_DIM=head_dim,
            DIM_TILE=dim_tile,
            SPLIT_TILE=triton.next_power_of_2(splits),
        )
        return out

    def prefill_attention(
        self, query: Tensor, pool: Tensor, layer: int, block_table: Tensor, start: int, scale: float
    ) -> Tensor:
        tokens, kv_heads, block_size, head_dim = query.shape[0], *pool.shape[3:]
        context = start + tokens
        blocks = block_table[: triton.cdiv(context, block_size)].long()
        held = pool[:, layer][blocks].permute(1, 2, 0, 3, 4).reshape(2, 1, kv_heads, -1, head_dim)
        keys, values = held[:, :, :, :context].to(query.dtype)
        positions = torch.arange(context, device=query.device)
        seen = positions <= positions[start:, None]
        out = functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None], keys, values, attn_mask=seen, scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1).contiguous()

    def gather_blocks(self, pool_bytes: Tensor, ids: Tensor, staging: Tensor) -> None:
        _copy_blocks(staging, pool_bytes, ids, scatter=False)

    def scatter_blocks(self, staging: Tensor, ids: Tensor, pool_bytes: Tensor) -> None:
        _copy_blocks(pool_bytes, staging, ids, scatter=True)

    def linear_add(self, x: Tensor, prepared: Linear, residual: Tensor) -> None:
        if prepared.bias is not None:
            residual += prepared.bias
        residual.addmm_(x.to(residual.dtype), prepared.data.to(residual.dtype).T)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        heads = 1 if x.dim() == 2 else x.shape[1]
        rms_norm_program[(x.shape[0] * heads,)](
            out,
            x,
            weight,
            heads,
            x.stride(0),
            x.stride(1),
            x.shape[-1],
            eps,
            TILE=triton.next_power_of_2(x.shape[-1]),
        )
        return out

    def rope(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        for rows in (query, key):
            tokens, heads, head_dim = rows.shape
            rope_program[(tokens, heads)](
                rows,
                cos,
                sin,
                positions,
                rows.stride(0),
                rows.stride(1),
                head_dim // 2,
                TILE=triton.next_power_of_2(head_dim // 2),
            )


def _copy_blocks(to: Tensor, source: Tensor, ids: Tensor, *, scatter: bool) -> None:
    if source.shape[1] % WORD_BYTES == 0:
        to, source = to.view(torch.int64), source.view(torch.int64)
    words = source.shape[1]
    grid = (len(ids), triton.cdiv(words, COPY_TILE))
    copy_blocks_program[grid](to, source, ids, words, SCATTER=scatter, TILE=COPY_TILE)


def _heads(rows: Tensor) -> Tensor:
    """``[tokens, heads, head_dim]`` with its heads side by side; usually as it is."""
    return rows if rows.stride(2) == 1 and rows.stride(1) == rows.shape[2] else rows.contiguous()
