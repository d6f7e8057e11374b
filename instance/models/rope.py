"""Rotary position embedding tables (Su et al. 2021), with the two scalings that stretch a model's context.

Tables are made once, for every position that may be served, and read by the rope kernel.
"""

import math

import torch
from torch import Tensor

from llumnix.instance.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions, float32 ``[head_dim / 2]``."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        return _stretch_slow(plain, rope)
    return plain


def _stretch_slow(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: wavelengths that the original context held many times stay, those it hardly held once are
    stretched by ``factor``, and between the two the change is gradual."""
    turns = rope.original_max_len * plain / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * plain + (1.0 - keep) * plain / rope.factor


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 ``[positions, head_dim / 2]`` each."""
    angles = torch.outer(torch.arange(positions).float(), inverse_frequencies(rope, head_dim))
    return angles.cos().to(device), angles.sin().to(device)
