"""The kernels as the models and the swap code call them: the device of the tensors picks the implementation.

On a GPU that is Triton, on a CPU the C library if a compiler is there, else the torch reference. See
``interface.Kernels`` for what each function promises.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from llumnix.kernels.cpu.compiled import load_library
from llumnix.kernels.cpu.kernels import CpuKernels
from llumnix.kernels.interface import Kernels, Linear
from llumnix.kernels.reference import ReferenceKernels

_chosen: dict[str, Kernels] = {}


def kernels_for(device_type: str) -> Kernels:
    """The best implementation for ``"cpu"`` or ``"cuda"``, chosen once per process."""
    kernels = _chosen.get(device_type)
    if kernels is None:
        kernels = _chosen[device_type] = best_kernels(device_type)
    return kernels


def best_kernels(device_type: str) -> Kernels:
    """What this machine has for ``"cpu"`` or ``"cuda"``; may compile."""
    if device_type == "cuda":
        from llumnix.kernels.gpu.kernels import TritonKernels  # a CPU needs no Triton

        return TritonKernels()
    library = load_library()
    return ReferenceKernels() if library is None else CpuKernels(library)


@contextmanager
def substituted(device_type: str, kernels: Kernels) -> Iterator[None]:
    """Use other kernels for a while, in the whole process: for measuring and comparing them."""
    before = kernels_for(device_type)
    _chosen[device_type] = kernels
    try:
        yield
    finally:
        _chosen[device_type] = before


def write_kv(pool: Tensor, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Store new keys and values in their slots of the pool."""
    kernels_for(pool.device.type).write_kv(pool, layer, keys, values, slots)


def decode_attention(
    query: Tensor, pool: Tensor, layer: int, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Attention of one token per request over its paged context."""
    return kernels_for(pool.device.type).decode_attention(
        query, pool, layer, block_tables, context_lens, scale
    )


def prefill_attention(
    query: Tensor, pool: Tensor, layer: int, block_table: Tensor, start: int, scale: float
) -> Tensor:
    """Causal attention of one request's chunk over its paged context."""
    return kernels_for(pool.device.type).prefill_attention(query, pool, layer, block_table, start, scale)


def gather_blocks(pool_bytes: Tensor, ids: Tensor, staging: Tensor) -> None:
    """Copy scattered blocks into one contiguous buffer."""
    kernels_for(pool_bytes.device.type).gather_blocks(pool_bytes, ids, staging)


def scatter_blocks(staging: Tensor, ids: Tensor, pool_bytes: Tensor) -> None:
    """Copy a contiguous buffer into scattered blocks."""
    kernels_for(pool_bytes.device.type).scatter_blocks(staging, ids, pool_bytes)


def prepare_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Lay out a weight ``[out, in]`` for this device."""
    return kernels_for(weight.device.type).prepare_linear(weight, bias)


def prepare_gated(gate: Tensor, up: Tensor) -> Linear:
    """Lay out the two weights of a gated projection, for ``linear_silu_mul``."""
    return kernels_for(gate.device.type).prepare_gated(gate, up)


def linear(x: Tensor, prepared: Linear) -> Tensor:
    """``x W^T + b``."""
    return kernels_for(x.device.type).linear(x, prepared)


def linear_add(x: Tensor, prepared: Linear, residual: Tensor) -> None:
    """``residual += x W^T + b``, in place."""
    kernels_for(x.device.type).linear_add(x, prepared, residual)


def linear_silu_mul(x: Tensor, prepared: Linear) -> Tensor:
    """``silu(x G^T) * (x U^T)`` of a gated projection."""
    return kernels_for(x.device.type).linear_silu_mul(x, prepared)


def embedding(ids: Tensor, prepared: Linear) -> Tensor:
    """Rows of a prepared weight, as activations."""
    return kernels_for(ids.device.type).embedding(ids, prepared)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension."""
    return kernels_for(x.device.type).rms_norm(x, weight, eps)


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """Rotary position embedding, in place."""
    kernels_for(query.device.type).rope(query, key, cos, sin, positions)
