"""Triton programs of decode attention over paged KV.

A context is cut into parts of SPLIT_TOKENS that are attended in parallel and then joined by their sums of
exponentials (flash decoding, Dao et al. 2023). The cut does not depend on the batch, so neither does a
result. All query heads that share a KV head are computed together, so its KV is read once.
"""

# Triton types a program's arguments at launch.
# ruff: noqa: ANN001
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import triton
import triton.language as tl

SPLIT_TOKENS = 512
KEY_TILE = 64
HEAD_TILE_MIN = 16  # least rows of a matrix product


@triton.jit
def attend_part_program(
    parts_ptr,
    log_sums_ptr,
    query_ptr,
    layer_ptr,
    tables_ptr,
    lens_ptr,
    scale,
    query_stride,
    block_stride,
    value_offset,
    tables_stride,
    block_size,
    SHARING: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
) -> None:
    """One request, one KV head, one part: a normalised partial result and the logarithm of its sum, in
    float32. ``parts`` are ``[batch, heads, splits, head_dim]``, ``log_sums`` ``[batch, heads, splits]``."""
    request, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    heads = tl.num_programs(1) * SHARING
    context = tl.load(lens_ptr + request)
    begin = part * SPLIT_TOKENS
    end = tl.minimum(begin + SPLIT_TOKENS, context)
    rows, dims, keys = tl.arange(0, HEAD_TILE), tl.arange(0, DIM_TILE), tl.arange(0, KEY_TILE)
    head = kv_head * SHARING + rows
    inside = (rows < SHARING)[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(
        query_ptr + request * query_stride + head[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0
    )
    highest = tl.full([HEAD_TILE], float("-inf"), tl.float32)
    total = tl.zeros([HEAD_TILE], tl.float32)
    mixed = tl.zeros([HEAD_TILE, DIM_TILE], tl.float32)
    for at in range(begin, end, KEY_TILE):
        position = at + keys
        held = position < end
        block = tl.load(tables_ptr + request * tables_stride + position // block_size, mask=held, other=0)
        row = block.to(tl.int64) * block_stride + (kv_head * block_size + position % block_size) * HEAD_DIM
        place = layer_ptr + row[:, None] + dims[None, :]
        readable = held[:, None] & (dims < HEAD_DIM)[None, :]
        key = tl.load(place, mask=readable, other=0.0).to(query.dtype)
        value = tl.load(place + value_offset, mask=readable, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(held[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp(highest - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(query.dtype), value, input_precision="ieee")
        highest = higher
    filled = begin < end
    log_sum = tl.where(filled, highest + tl.log(tl.where(filled, total, 1.0)), float("-inf"))
    mixed = mixed / tl.where(filled, total, 1.0)[:, None]
    slot = (request * heads + head) * splits + part
    tl.store(parts_ptr + slot[:, None] * HEAD_DIM + dims[None, :], mixed, mask=inside)
    tl.store(log_sums_ptr + slot, log_sum, mask=rows < SHARING)


@triton.jit
def join_parts_program(
    out_ptr,
    parts_ptr,
    log_sums_ptr,
    splits,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
) -> None:
    """One request's one query head: the mean of its parts, weighted by their sums of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    part, dims = tl.arange(0, SPLIT_TILE), tl.arange(0, DIM_TILE)
    log_sums = tl.load(log_sums_ptr + row * splits + part, mask=part < splits, other=float("-inf"))
    weights = tl.exp(log_sums - tl.max(log_sums, axis=0))
    inside = (part < splits)[:, None] & (dims < HEAD_DIM)[None, :]
    place = parts_ptr + (row * splits + part[:, None]) * HEAD_DIM + dims[None, :]
    parts = tl.load(place, mask=inside, other=0.0)
    mean = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out_ptr + row * HEAD_DIM + dims, mean.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
