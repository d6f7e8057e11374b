"""Triton programs that write new KV into the pool and copy whole blocks between it and a contiguous
buffer."""

# Triton types a program's arguments at launch.
# ruff: noqa: ANN001
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def write_kv_program(
    layer_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    block_stride,
    value_offset,
    key_stride,
    value_stride,
    block_size,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
) -> None:
    """One token's row of one KV head; ``layer_ptr`` is this layer's keys in block 0."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    dims = tl.arange(0, DIM_TILE)
    inside = dims < HEAD_DIM
    row = (slot // block_size) * block_stride + (head * block_size + slot % block_size) * HEAD_DIM
    key = tl.load(keys_ptr + token * key_stride + head * HEAD_DIM + dims, mask=inside)
    value = tl.load(values_ptr + token * value_stride + head * HEAD_DIM + dims, mask=inside)
    target = layer_ptr + row + dims
    tl.store(target, key, mask=inside)
    tl.store(target + value_offset, value, mask=inside)


@triton.jit
def copy_blocks_program(
    to_ptr,
    from_ptr,
    ids_ptr,
    words,
    SCATTER: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One tile of one block of ``words`` words: pool to staging, or with SCATTER staging to pool."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < words
    scattered, packed = tl.load(ids_ptr + row) * words + at, row * words + at
    if SCATTER:
        tl.store(to_ptr + scattered, tl.load(from_ptr + packed, mask=inside), mask=inside)
    else:
        tl.store(to_ptr + packed, tl.load(from_ptr + scattered, mask=inside), mask=inside)
