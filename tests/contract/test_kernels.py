"""The kernel contract for the torch reference, the C library, and Triton's kernels in its interpreter.

Triton decides when it is first imported whether it interprets, so its share runs in a process of its own.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from llumnix.kernels.cpu.compiled import load_library
from llumnix.kernels.cpu.kernels import CpuKernels, Product
from llumnix.kernels.interface import Kernels
from llumnix.kernels.reference import ReferenceKernels

sys.path.insert(0, str(Path(__file__).parent))
from kernel_contract import DTYPES, KernelContract, activations, stored

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
interpreting = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> str:
    return "cpu"


class TestReference(KernelContract):
    @pytest.fixture
    def kernels(self) -> Kernels:
        return ReferenceKernels()


@needs_compiler
class TestC(KernelContract):
    """With every way of multiplying that this machine has."""

    @pytest.fixture(params=Product, ids=lambda product: product.name)
    def kernels(self, request: pytest.FixtureRequest) -> Kernels:
        library = load_library()
        assert library is not None
        if request.param > library.llumnix_best_product():
            pytest.skip(f"this machine has no {request.param.name}")
        return CpuKernels(library, request.param)

    def test_a_way_of_multiplying_that_the_machine_lacks_is_refused(self) -> None:
        class Old:
            """A library on a machine without bfloat16 products."""

            def llumnix_best_product(self) -> int:
                return Product.WIDENED

        with pytest.raises(ValueError, match="no AMX_BF16"):
            CpuKernels(cast(ctypes.CDLL, Old()), Product.AMX_BF16)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_row_does_not_depend_on_the_others(self, kernels: Kernels, dtype: torch.dtype) -> None:
        """Bit for bit, for every batch size, whatever the number of threads."""
        weight = stored(100, 72, dtype=dtype, device="cpu")
        plain, gated = kernels.prepare_linear(weight, None), kernels.prepare_gated(weight, weight.flip(0))
        x = activations(400, 72, like=dtype, device="cpu")  # enough for threads to take rows of their own
        whole, whole_gated = kernels.linear(x, plain), kernels.linear_silu_mul(x, gated)
        for count in [*range(1, 33), 64, 149, 300]:
            rows = slice(400 - count, 400)
            assert torch.equal(kernels.linear(x[rows], plain), whole[rows])
            assert torch.equal(kernels.linear_silu_mul(x[rows], gated), whole_gated[rows])
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(kernels.linear(x, plain), whole)
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("block_size,heads", [(4, 9), (16, 9), (16, 60)])
    def test_prefill_in_any_chunks_and_decode_agree_bit_for_bit(
        self, kernels: Kernels, dtype: torch.dtype, block_size: int, heads: int
    ) -> None:
        tokens = 37 * block_size
        pool = stored(40, 2, 2, 3, block_size, 64, dtype=dtype, device="cpu")
        table = torch.randperm(40, generator=torch.Generator().manual_seed(4)).int()
        query = activations(tokens, heads, 64, like=dtype, device="cpu")
        whole = kernels.prefill_attention(query, pool, 1, table, 0, 0.125)
        for begin, end in ((0, 1), (0, 50), (50, 67), (67, tokens)):
            part = kernels.prefill_attention(query[begin:end], pool, 1, table, begin, 0.125)
            assert torch.equal(part, whole[begin:end])
        lens = torch.arange(1, tokens + 1, dtype=torch.int32)
        tables = table.expand(tokens, -1).contiguous()
        assert torch.equal(kernels.decode_attention(query, pool, 1, tables, lens, 0.125), whole)

    def test_callers_on_several_threads_share_the_workers(self, kernels: Kernels) -> None:
        """One caller at a time has the workers; the others compute alone. Nothing hangs, nothing mixes."""
        weight = kernels.prepare_linear(stored(400, 32, dtype=torch.float32, device="cpu"), None)
        inputs = [activations(7, 32, like=torch.float32, device="cpu", seed=seed) for seed in range(4)]
        expected = [kernels.linear(x, weight) for x in inputs]

        def call(index: int) -> bool:
            torch.set_num_threads(3)
            return all(
                torch.equal(kernels.linear(inputs[index], weight), expected[index]) for _ in range(300)
            )

        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(4) as pool:
                assert all(pool.map(call, range(4)))
        finally:
            torch.set_num_threads(threads)

    def test_every_half_and_bfloat_value_is_widened_and_narrowed_right(self, kernels: Kernels) -> None:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
        for dtype in (torch.float16, torch.bfloat16):
            weight: Tensor = bits.view(dtype).reshape(-1, 8)
            rows = kernels.embedding(torch.arange(len(weight)), kernels.prepare_linear(weight, None))
            torch.testing.assert_close(rows, weight.float(), rtol=0.0, atol=0.0, equal_nan=True)
            # Values between two neighbours, ties included, round as torch rounds them.
            spread = torch.cat([rows, rows * (1 + 2.0**-9), rows * (1 + 2.0**-12), rows * (1 - 3 * 2.0**-11)])
            pool = torch.zeros(len(spread), 1, 2, 1, 1, 8, dtype=dtype)
            keys = spread[:, None]
            kernels.write_kv(pool, 0, keys, keys, torch.arange(len(spread)))
            torch.testing.assert_close(
                pool[:, 0, 0, 0, 0], spread.to(dtype), rtol=0.0, atol=0.0, equal_nan=True
            )


@pytest.mark.skipif(not interpreting, reason="runs in a process of its own, see below")
class TestTriton(KernelContract):
    @pytest.fixture
    def kernels(self) -> Kernels:
        from llumnix.kernels.gpu.kernels import TritonKernels

        return TritonKernels()


@pytest.mark.skipif(interpreting, reason="this is the inner run")
def test_triton_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "TestTriton"]
    inner = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert inner.returncode == 0, inner.stdout[-5000:]
    assert " passed" in inner.stdout
