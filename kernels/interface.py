"""What every implementation of the kernels offers: the torch reference, C for CPUs, Triton for GPUs.

Shapes and rules stand here once. ``pool`` is block first, ``[blocks, layers, 2, kv_heads, block_size,
head_dim]``, keys at index 0 and values at 1 of its third dimension. Activations are float32 on a CPU and of
the model's dtype on a GPU; weights and KV are of the model's dtype everywhere, and what is multiplied with
them may be rounded to it; sums are float32.
Models reach these through ``ops``, which picks the implementation by the tensors' device; the contract tests
run each one by itself.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """Weights of ``y = x W^T + b`` made ready by one implementation, which alone knows the layout of
    ``data``. ``gated``: two projections of equal size side by side, for ``linear_silu_mul`` only."""

    data: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
    gated: bool = False


class Kernels(Protocol):
    """One implementation. Nothing here keeps state, so calls from several threads do not disturb each
    other."""

    def write_kv(self, pool: Tensor, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Store ``keys`` and ``values`` ``[tokens, kv_heads, head_dim]`` in their slots, int64 ``[tokens]``,
        each block id * block_size + offset."""
        ...

    def decode_attention(
        self,
        query: Tensor,
        pool: Tensor,
        layer: int,
        block_tables: Tensor,
        context_lens: Tensor,
        scale: float,
    ) -> Tensor:
        """Attention of one new token per request over its whole context, its own KV included. ``query`` and
        the result are ``[batch, heads, head_dim]``; ``block_tables`` int32 ``[batch, blocks]``, rows padded
        with any valid id; ``context_lens`` int32 ``[batch]``, each at least 1. Query heads share KV heads in
        equal groups."""
        ...

    def prefill_attention(
        self, query: Tensor, pool: Tensor, layer: int, block_table: Tensor, start: int, scale: float
    ) -> Tensor:
        """Causal attention of one request's tokens at positions ``start …`` over its blocks ``block_table``
        int32 ``[blocks]``, which already hold these tokens' KV. ``query`` and the result are ``[tokens,
        heads, head_dim]``."""
        ...

    def gather_blocks(self, pool_bytes: Tensor, ids: Tensor, staging: Tensor) -> None:
        """``staging[i] = pool_bytes[ids[i]]``; uint8 ``[blocks, block_bytes]`` both, ids int64."""
        ...

    def scatter_blocks(self, staging: Tensor, ids: Tensor, pool_bytes: Tensor) -> None:
        """``pool_bytes[ids[i]] = staging[i]``; ids must not repeat."""
        ...

    def prepare_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Lay out ``weight`` ``[out, in]``; it may be dropped afterwards."""
        ...

    def prepare_gated(self, gate: Tensor, up: Tensor) -> Linear:
        """Lay out the two weights ``[out, in]`` of a gated projection."""
        ...

    def linear(self, x: Tensor, prepared: Linear) -> Tensor:
        """``[tokens, in]`` to ``[tokens, out]``."""
        ...

    def linear_add(self, x: Tensor, prepared: Linear, residual: Tensor) -> None:
        """``residual += linear(x)``, in place."""
        ...

    def linear_silu_mul(self, x: Tensor, prepared: Linear) -> Tensor:
        """``silu(gate(x)) * up(x)``, ``[tokens, out]``."""
        ...

    def embedding(self, ids: Tensor, prepared: Linear) -> Tensor:
        """Rows ``ids`` (int64 ``[tokens]``) of the weight that was prepared, as activations ``[tokens, in]``:
        tied embeddings need no second copy."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm over the last dimension (Zhang and Sennrich 2019), computed in float32."""
        ...

    def rope(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        """Rotate ``query`` and ``key`` ``[tokens, heads, head_dim]`` in place, first half against second
        half. They may be views of one wider projection. ``cos`` and ``sin`` are float32 ``[positions,
        head_dim / 2]``, ``positions`` int64 ``[tokens]``."""
        ...
