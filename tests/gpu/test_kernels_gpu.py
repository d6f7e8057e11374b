"""The kernel contract on a real GPU: Triton's kernels compiled, through the same dispatch as the models
use."""

import sys
from pathlib import Path

import pytest
import torch

from llumnix.kernels import ops
from llumnix.kernels.interface import Kernels

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from kernel_contract import KernelContract

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class TestGpu(KernelContract):
    @pytest.fixture
    def device(self) -> str:
        return "cuda"

    @pytest.fixture
    def kernels(self, monkeypatch: pytest.MonkeyPatch) -> Kernels:
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        return ops.kernels_for("cuda")
