"""What every implementation of the kernels must do, on whichever device it runs.

Subclassed by test_kernels.py (reference, C, Triton's interpreter) and by tests/gpu; each gives the fixtures
``kernels`` and ``device``. Results are compared with a reference computed in float64 or float32 from the same
stored values, so that tolerances cover rounding of the result only.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llumnix.kernels.interface import Kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LAYERS, LAYER = 2, 1


def activations(*shape: int, like: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Random activations: float32 on a CPU, of the weights' dtype on a GPU."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device, torch.float32 if device == "cpu" else like)


def stored(*shape: int, dtype: torch.dtype, device: str, seed: int = 1) -> Tensor:
    """Random weights or KV in their storage format."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def plain_attention(query: Tensor, pool: Tensor, table: Tensor, position: int, scale: float) -> Tensor:
    """One token's attention ``[heads, head_dim]`` by the textbook, in float64, key by key."""
    heads, _ = query.shape
    kv_heads, block_size = pool.shape[3], pool.shape[4]
    out = []
    for head in range(heads):
        kv = head // (heads // kv_heads)
        places = [(int(table[at // block_size]), at % block_size) for at in range(position + 1)]
        keys = torch.stack([pool[block, LAYER, 0, kv, offset] for block, offset in places]).double()
        values = torch.stack([pool[block, LAYER, 1, kv, offset] for block, offset in places]).double()
        weights = torch.softmax(keys @ query[head].double() * scale, dim=0)
        out.append(weights @ values)
    return torch.stack(out)


class KernelContract:
    """See the module."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_write_kv_fills_exactly_the_given_slots(
        self, kernels: Kernels, device: str, dtype: torch.dtype
    ) -> None:
        pool = stored(6, LAYERS, 2, 3, 4, 16, dtype=dtype, device=device)
        before = pool.clone()
        # Keys and values as a model has them: views of one projection.
        rows = activations(5, 12, 16, like=dtype, device=device)
        keys, values = rows[:, 6:9], rows[:, 9:]
        slots = [23, 0, 9, 10, 4]
        kernels.write_kv(pool, LAYER, keys, values, torch.tensor(slots, device=device))
        for token, slot in enumerate(slots):
            assert torch.equal(pool[slot // 4, LAYER, 0, :, slot % 4], keys[token].to(dtype))
            assert torch.equal(pool[slot // 4, LAYER, 1, :, slot % 4], values[token].to(dtype))
            before[slot // 4, LAYER, :, :, slot % 4] = pool[slot // 4, LAYER, :, :, slot % 4]
        assert torch.equal(pool, before)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "heads,kv_heads,head_dim,block_size", [(6, 2, 16, 4), (4, 4, 24, 1), (9, 3, 64, 16)]
    )
    def test_decode_attention(
        self,
        kernels: Kernels,
        device: str,
        dtype: torch.dtype,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
    ) -> None:
        contexts = [1, 7, 33, 2 * block_size]
        blocks = [math.ceil(context / block_size) for context in contexts]
        pool = stored(sum(blocks) + 1, LAYERS, 2, kv_heads, block_size, head_dim, dtype=dtype, device=device)
        pool[0] = float("inf")  # padding of the tables points here: it must not be read into any result
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(2)) + 1
        tables = torch.zeros(len(contexts), max(blocks), dtype=torch.int32, device=device)
        for row, count in enumerate(blocks):
            tables[row, :count] = order[sum(blocks[:row]) : sum(blocks[: row + 1])]
        query = activations(len(contexts), heads + 2, head_dim, like=dtype, device=device)[:, :heads]
        lens = torch.tensor(contexts, dtype=torch.int32, device=device)
        out = kernels.decode_attention(query, pool, LAYER, tables, lens, head_dim**-0.5)
        assert out.shape == query.shape and out.dtype == query.dtype
        for row, context in enumerate(contexts):
            expected = plain_attention(query[row], pool, tables[row], context - 1, head_dim**-0.5)
            torch.testing.assert_close(
                out[row].double(), expected, atol=self.attention_tolerance(query, pool), rtol=0.0
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("start,tokens", [(0, 1), (0, 21), (13, 9), (30, 2)])
    @pytest.mark.parametrize("block_size", [4, 16])
    def test_prefill_attention(
        self,
        kernels: Kernels,
        device: str,
        dtype: torch.dtype,
        start: int,
        tokens: int,
        block_size: int,
    ) -> None:
        pool = stored(12, LAYERS, 2, 2, block_size, 32, dtype=dtype, device=device)
        table = torch.tensor([7, 2, 9, 4, 1, 11, 3, 8, 5], dtype=torch.int32, device=device)
        query = activations(tokens, 10, 32, like=dtype, device=device)[:, :6]
        out = kernels.prefill_attention(query, pool, LAYER, table, start, 0.2)
        assert out.shape == query.shape and out.dtype == query.dtype
        for row in range(tokens):
            expected = plain_attention(query[row], pool, table, start + row, 0.2)
            torch.testing.assert_close(
                out[row].double(), expected, atol=self.attention_tolerance(query, pool), rtol=0.0
            )

    @pytest.mark.parametrize("dtype,head_dim", [(torch.float32, 16), (torch.bfloat16, 96)])
    def test_decode_attention_over_a_long_context(
        self, kernels: Kernels, device: str, dtype: torch.dtype, head_dim: int
    ) -> None:
        """Long enough to be split where an implementation splits contexts, beside one that is not."""
        pool = stored(90, LAYERS, 2, 1, 16, head_dim, dtype=dtype, device=device)
        pool[2, :, :, :, 8:] = float("nan")  # beyond the second one's context, and not the first one's
        tables = torch.stack([torch.arange(89, 4, -1), torch.arange(85)]).int().to(device)
        query = activations(2, 3, head_dim, like=dtype, device=device)
        lens = torch.tensor([1305, 40], dtype=torch.int32, device=device)
        out = kernels.decode_attention(query, pool, LAYER, tables, lens, 0.5)
        for row in range(2):
            expected = plain_attention(query[row], pool, tables[row], int(lens[row]) - 1, 0.5)
            tolerance = self.attention_tolerance(query, pool)
            torch.testing.assert_close(out[row].double(), expected, atol=tolerance, rtol=0.0)

    def test_large_scores_do_not_overflow(self, kernels: Kernels, device: str) -> None:
        pool = stored(4, LAYERS, 2, 1, 4, 16, dtype=torch.float32, device=device) * 100
        table = torch.tensor([[3, 1, 2]], dtype=torch.int32, device=device)
        query = activations(1, 2, 16, like=torch.float32, device=device) * 100
        lens = torch.tensor([11], dtype=torch.int32, device=device)
        out = kernels.decode_attention(query, pool, LAYER, table, lens, 1.0)
        expected = plain_attention(query[0], pool, table[0], 10, 1.0)
        torch.testing.assert_close(out[0].double(), expected, atol=1e-2, rtol=0.0)

    def test_gather_and_scatter_blocks(self, kernels: Kernels, device: str) -> None:
        generator = torch.Generator().manual_seed(3)
        pool = torch.randint(0, 256, (9, 40), dtype=torch.uint8, generator=generator).to(device)
        ids = torch.tensor([4, 5, 6, 1, 0, 8], device=device)
        staging = torch.zeros(6, 40, dtype=torch.uint8, device=device)
        kernels.gather_blocks(pool, ids, staging)
        assert torch.equal(staging, pool[ids])
        target = torch.zeros_like(pool)
        kernels.scatter_blocks(staging, ids, target)
        assert torch.equal(target[ids], staging)
        untouched = torch.tensor([2, 3, 7], device=device)
        assert not target[untouched].any()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens,inner,outer", [(1, 40, 70), (3, 16, 5), (8, 33, 16), (100, 64, 48)])
    def test_linear(
        self, kernels: Kernels, device: str, dtype: torch.dtype, tokens: int, inner: int, outer: int
    ) -> None:
        x = activations(tokens, inner, like=dtype, device=device)
        weight = stored(outer, inner, dtype=dtype, device=device) * inner**-0.5
        bias = stored(outer, dtype=dtype, device=device, seed=5)
        plain, biased = kernels.prepare_linear(weight, None), kernels.prepare_linear(weight, bias)
        expected = x.double() @ weight.double().T
        self.close(kernels.linear(x, plain), expected, dtype)
        self.close(kernels.linear(x, biased), expected + bias.double(), dtype)
        residual = activations(tokens, outer, like=dtype, device=device, seed=6)
        summed = residual.double() + expected + bias.double()
        kernels.linear_add(x, biased, residual)
        self.close(residual, summed, dtype)
        up = stored(outer, inner, dtype=dtype, device=device, seed=7) * inner**-0.5
        gated = kernels.linear_silu_mul(x, kernels.prepare_gated(weight, up))
        self.close(gated, functional.silu(expected) * (x.double() @ up.double().T), dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_embedding_reads_rows_of_a_prepared_weight(
        self, kernels: Kernels, device: str, dtype: torch.dtype
    ) -> None:
        weight = stored(50, 24, dtype=dtype, device=device)
        ids = torch.tensor([0, 49, 17, 8, 17], device=device)
        rows = kernels.embedding(ids, kernels.prepare_linear(weight, None))
        assert rows.dtype == (torch.float32 if device == "cpu" else dtype)
        assert torch.equal(rows, weight[ids].to(rows.dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rms_norm(self, kernels: Kernels, device: str, dtype: torch.dtype) -> None:
        x = activations(5, 7, 20, like=dtype, device=device) * 3
        weight = stored(20, dtype=dtype, device=device)
        heads = x[:, 2:6]  # a view, as the norms of queries and keys get
        for rows in (heads, heads.reshape(20, 20)):
            wide = rows.double()
            expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
            out = kernels.rms_norm(rows, weight, 1e-5)
            assert out.dtype == x.dtype
            self.close(out, expected, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rope_rotates_in_place_and_nothing_else(
        self, kernels: Kernels, device: str, dtype: torch.dtype
    ) -> None:
        rows = activations(4, 9, 16, like=dtype, device=device)
        before = rows.clone()
        angles = torch.outer(torch.arange(40.0), torch.linspace(1.0, 0.01, 8)).to(device)
        positions = torch.tensor([39, 0, 7, 7], device=device)
        kernels.rope(rows[:, :4], rows[:, 4:6], angles.cos(), angles.sin(), positions)
        turned = torch.polar(torch.ones(4, 1, 8, device=device), angles[positions][:, None])
        pairs = torch.complex(before[:, :6, :8].float(), before[:, :6, 8:].float()) * turned
        self.close(rows[:, :6], torch.cat([pairs.real, pairs.imag], dim=-1).double(), dtype)
        assert torch.equal(rows[:, 6:], before[:, 6:])

    def close(self, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
        """Equal up to roundings to ``dtype`` of the inputs and of each step's result."""
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)

    def attention_tolerance(self, query: Tensor, pool: Tensor) -> float:
        """Sums are float32 everywhere; the result is rounded to the queries' format, and queries and weights
        may be to the KV's."""
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
        return max(tolerance[query.dtype], tolerance[pool.dtype])
