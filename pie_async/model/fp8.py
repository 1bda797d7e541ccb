"""Weights in FP8's e4m3, with one float32 scale per output channel."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_MAX_FP8 = 448.0
_SMALLEST_SCALE = 1e-12
"""A channel of zeros must not divide by zero."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 numbers like the [out, k] weight and [out] float32 scales; their product is about it."""
    wide = weight.float()
    scale = (wide.abs().amax(1) / _MAX_FP8).clamp_min(_SMALLEST_SCALE)
    return (wide / scale[:, None]).clamp(-_MAX_FP8, _MAX_FP8).to(FP8), scale


def widen(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` made of a weight, in plain numbers."""
    return (weight.float() * scale[:, None]).to(dtype)
