"""The decoder shared by every supported architecture: what varies between them is in ModelConfig and in which
weights are there.

It works on a flat batch: the tokens of all requests of a step one after another, first those that decode, one
each, then prefill chunks. Only attention knows requests apart. All arithmetic goes through ``kernels.ops``,
which picks the implementation for the device. Called by the torch executor, which owns the pool and makes the
batches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llumnix.instance.models.config import ModelConfig
from llumnix.instance.models.rope import rope_tables
from llumnix.kernels import ops
from llumnix.kernels.interface import Linear


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer. ``qkv`` has query, key and value rows in that order; the head norms are there with qk_norm
    only."""

    input_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """A whole model. With tied embeddings ``lm_head`` is ``embedding``."""

    embedding: Linear
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    lm_head: Linear


@dataclass(frozen=True, slots=True, eq=False)
class PrefillSpan:
    """Rows ``begin … end - 1`` of a batch: one request's chunk, at positions ``start …``. ``block_table``
    int32."""

    begin: int
    end: int
    start: int
    block_table: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FlatBatch:
    """A step's input. ``tokens``, ``positions`` and ``slots`` (where each token's KV goes) are int64
    ``[tokens]``; the first ``decodes`` rows attend by ``block_tables`` int32 ``[decodes, blocks]`` and
    ``context_lens`` int32."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    decodes: int
    block_tables: Tensor
    context_lens: Tensor
    prefills: tuple[PrefillSpan, ...]


class Decoder:
    """Weights made ready for one device, and the computation over them. Keeps no state between calls."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, max_len: int) -> None:
        self.config = config
        self._weights = weights
        self._cos, self._sin = rope_tables(config.rope, config.head_dim, max_len, weights.final_norm.device)
        self._scale = config.head_dim**-0.5

    def hidden(self, batch: FlatBatch, pool: Tensor) -> Tensor:
        """Run every layer, writing the batch's KV into ``pool``. Hidden states ``[tokens, hidden_size]``,
        before the final norm."""
        eps = self.config.norm_eps
        residual = ops.embedding(batch.tokens, self._weights.embedding)
        for index, layer in enumerate(self._weights.layers):
            mixed = self._attention(ops.rms_norm(residual, layer.input_norm, eps), layer, index, batch, pool)
            ops.linear_add(mixed, layer.output, residual)
            gated = ops.linear_silu_mul(ops.rms_norm(residual, layer.mlp_norm, eps), layer.gate_up)
            ops.linear_add(gated, layer.down, residual)
        return residual

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores ``[rows, vocab_size]`` in float32 of the next token after each row of hidden states."""
        normed = ops.rms_norm(hidden, self._weights.final_norm, self.config.norm_eps)
        return ops.linear(normed, self._weights.lm_head).float()

    def _attention(
        self, x: Tensor, layer: LayerWeights, index: int, batch: FlatBatch, pool: Tensor
    ) -> Tensor:
        config = self.config
        heads = ops.linear(x, layer.qkv).view(x.shape[0], config.heads + 2 * config.kv_heads, config.head_dim)
        query, key, value = torch.split(heads, [config.heads, config.kv_heads, config.kv_heads], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query = ops.rms_norm(query, layer.query_norm, config.norm_eps)
            key = ops.rms_norm(key, layer.key_norm, config.norm_eps)
        ops.rope(query, key, self._cos, self._sin, batch.positions)
        ops.write_kv(pool, index, key, value, batch.slots)
        return self._attend(query, index, batch, pool).reshape(x.shape[0], config.heads * config.head_dim)

    def _attend(self, query: Tensor, index: int, batch: FlatBatch, pool: Tensor) -> Tensor:
        parts = []
        if batch.decodes:
            decoding = query[: batch.decodes]
            parts.append(
                ops.decode_attention(
                    decoding, pool, index, batch.block_tables, batch.context_lens, self._scale
                )
            )
        for span in batch.prefills:
            chunk = query[span.begin : span.end]
            parts.append(ops.prefill_attention(chunk, pool, index, span.block_table, span.start, self._scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
