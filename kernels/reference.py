"""The kernels in plain torch: they define what is right, and serve wherever no faster one can be had.

Every step that could lose accuracy is done in float32. Used by ``ops`` on a CPU without a C compiler, by the
Triton implementation for what torch already does well, and by the contract tests as the truth.
"""

import torch
from torch import Tensor
from torch.nn import functional

from llumnix.kernels.interface import Linear


class ReferenceKernels:
    """See Kernels for the contracts."""

    def write_kv(self, pool: Tensor, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        block_size = pool.shape[4]
        blocks, offsets = slots // block_size, slots % block_size
        pool[blocks, layer, 0, :, offsets] = keys.to(pool.dtype)
        pool[blocks, layer, 1, :, offsets] = values.to(pool.dtype)

    def decode_attention(
        self,
        query: Tensor,
        pool: Tensor,
        layer: int,
        block_tables: Tensor,
        context_lens: Tensor,
        scale: float,
    ) -> Tensor:
        batch, heads, head_dim = query.shape
        kv_heads, block_size = pool.shape[3], pool.shape[4]
        context_max = block_tables.shape[1] * block_size
        held = pool[:, layer][block_tables.long()].permute(2, 0, 3, 1, 4, 5)
        keys, values = held.reshape(2, batch, kv_heads, context_max, head_dim).float()
        beyond = torch.arange(context_max, device=query.device) >= context_lens[:, None]
        grouped = query.float().view(batch, kv_heads, heads // kv_heads, head_dim)
        scores = torch.matmul(grouped, keys.transpose(2, 3)) * scale
        weights = torch.softmax(scores.masked_fill(beyond[:, None, None], float("-inf")), dim=-1)
        # Blocks may hold anything beyond the context, and 0 * inf is not 0.
        values = values.masked_fill(beyond[:, None, :, None], 0.0)
        return torch.matmul(weights, values).reshape(batch, heads, head_dim).to(query.dtype)

    def prefill_attention(
        self, query: Tensor, pool: Tensor, layer: int, block_table: Tensor, start: int, scale: float
    ) -> Tensor:
        tokens, heads, head_dim = query.shape
        kv_heads, block_size = pool.shape[3], pool.shape[4]
        context = start + tokens
        blocks = block_table[: -(-context // block_size)].long()
        held = pool[:, layer][blocks].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
        keys, values = held[:, :, :context].float()
        grouped = query.float().view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
        scores = torch.matmul(grouped, keys[:, None].transpose(2, 3)) * scale
        positions = torch.arange(context, device=query.device)
        future = positions > positions[start:, None]
        weights = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        out = torch.matmul(weights, values[:, None]).permute(2, 0, 1, 3)
        return out.reshape(tokens, heads, head_dim).to(query.dtype)

    def gather_blocks(self, pool_bytes: Tensor, ids: Tensor, staging: Tensor) -> None:
        torch.index_select(pool_bytes, 0, ids, out=staging)

    def scatter_blocks(self, staging: Tensor, ids: Tensor, pool_bytes: Tensor) -> None:
        pool_bytes.index_copy_(0, ids, staging)

    def prepare_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return Linear(weight.contiguous(), bias, weight.shape[1], weight.shape[0])

    def prepare_gated(self, gate: Tensor, up: Tensor) -> Linear:
        return Linear(torch.cat([gate, up]), None, gate.shape[1], gate.shape[0], gated=True)

    def linear(self, x: Tensor, prepared: Linear) -> Tensor:
        weight = prepared.data
        return functional.linear(x.to(weight.dtype), weight, prepared.bias).to(x.dtype)

    def linear_add(self, x: Tensor, prepared: Linear, residual: Tensor) -> None:
        residual += self.linear(x, prepared)

    def linear_silu_mul(self, x: Tensor, prepared: Linear) -> Tensor:
        gate, up = self.linear(x, prepared).chunk(2, dim=-1)
        return functional.silu(gate) * up

    def embedding(self, ids: Tensor, prepared: Linear) -> Tensor:
        rows = prepared.data[ids]
        return rows.float() if rows.device.type == "cpu" else rows

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        return (scaled * weight.float()).to(x.dtype)

    def rope(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        cosine, sine = cos[positions][:, None], sin[positions][:, None]
        for heads in (query, key):
            first, second = heads.float().chunk(2, dim=-1)
            rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
            heads.copy_(rotated)
