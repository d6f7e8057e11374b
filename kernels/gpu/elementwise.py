"""Triton programs of the small operations of a layer."""

# Triton types a program's arguments at launch.
# ruff: noqa: ANN001
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def rms_norm_program(
    out_ptr,
    x_ptr,
    weight_ptr,
    heads,
    token_stride,
    head_stride,
    size,
    eps,
    TILE: tl.constexpr,
) -> None:
    """One row ``x[token, head]``; ``out`` is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, TILE)
    inside = at < size
    place = x_ptr + row // heads * token_stride + row % heads * head_stride + at
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scaled = x / tl.sqrt(tl.sum(x * x, axis=0) / size + eps) * weight
    tl.store(out_ptr + row * size + at, scaled.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rope_program(
    x_ptr,
    cosines_ptr,
    sines_ptr,
    positions_ptr,
    token_stride,
    head_stride,
    half,
    TILE: tl.constexpr,
) -> None:
    """One head of one token, in place."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, TILE)
    inside = at < half
    angle = tl.load(positions_ptr + token) * half + at
    cosine = tl.load(cosines_ptr + angle, mask=inside, other=0.0)
    sine = tl.load(sines_ptr + angle, mask=inside, other=0.0)
    place = x_ptr + token * token_stride + tl.program_id(1) * head_stride + at
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (first * cosine - second * sine).to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(place + half, (second * cosine + first * sine).to(x_ptr.dtype.element_ty), mask=inside)
