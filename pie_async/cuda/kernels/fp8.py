"""Linear layers whose weight is FP8 (e4m3) with one scale per output channel.

For few tokens the weight is converted on its way to the matrix units, which costs no bandwidth
and leaves the activations as they are; for many, activations are quantised per token and the
matrix units multiply FP8 at twice the rate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from pie_async.cuda.kernels.linear import (
    FEWEST_PROGRAMS,
    MAX_TOKENS,
    Choice,
    multiply,
    triton_candidates,
)

FP8 = torch.float8_e4m3fn
MAX_FP8 = 448.0

SCALED: Choice = ("scaled",)
"""Activations are quantised as well."""
WIDENED: Choice = ("widened",)
"""The weight is converted whole, then torch multiplies."""

_SMALLEST_SCALE = 1e-12
"""A row of zeros must not divide by zero."""
_MULTIPLE = 16
"""torch's scaled product takes sizes that this divides."""


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    choice: Choice | None = None,
) -> Tensor:
    """x (W * scale)^T + b in x's dtype; a choice that does not fit widens the weight instead.

    Args:
        x: [n, k] float16 or bfloat16; rows may be apart.
        weight: [out, k] float8_e4m3fn, contiguous.
        scale: [out] float32. bias: [out].
    """
    choice = choice or WIDENED
    if choice == SCALED and _can_scale(x, weight):
        return _scaled(x, weight, scale, bias)
    product = multiply(x, weight, scale, bias, choice)
    return linear_fp8_reference(x, weight, scale, bias) if product is None else product


def linear_fp8_reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`linear_fp8` in plain torch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return functional.linear(x, (weight.to(wide) * scale.to(wide)[:, None]).to(x.dtype), bias)


def candidates_fp8(m: int, n: int, k: int, *, quantizes_activations: bool = True) -> list[Choice]:
    """What may be fastest for [m, k] by [n, k], first what every m can have.

    Args:
        quantizes_activations: as the checkpoint was made for; otherwise only weights are FP8.
    """
    choices = [SCALED if quantizes_activations else WIDENED]
    if m > MAX_TOKENS:
        return choices
    # Each waits for its conversions, so more of them share a multiprocessor. H200, 16 tokens,
    # 14336 -> 4096: 36.8 us in 128 programs, 27.9 in 256.
    return choices + triton_candidates(m, n, fewest_programs=2 * FEWEST_PROGRAMS)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in FP8 with a scale of its own, so that its largest number is the largest FP8.

    Args:
        x: [n, k]; rows may be apart.

    Returns:
        [n, k] float8_e4m3fn and [n, 1] float32, whose product is about x.
    """
    rows, size = x.shape
    assert x.stride(1) == 1
    numbers = torch.empty((rows, size), dtype=FP8, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(size)
        _quantize_kernel[(rows,)](
            x,
            numbers,
            scales,
            size,
            x.stride(0),
            smallest=_SMALLEST_SCALE,
            largest=MAX_FP8,
            block=block,
            num_warps=min(max(block // 512, 1), 16),
        )
    return numbers, scales


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in plain torch."""
    wide = x if x.dtype == torch.float64 else x.float()
    scales = (wide.abs().amax(1, keepdim=True) / MAX_FP8).clamp_min(_SMALLEST_SCALE)
    return (wide / scales).clamp(-MAX_FP8, MAX_FP8).to(FP8), scales.float()


def _can_scale(x: Tensor, weight: Tensor) -> bool:
    return x.is_cuda and not (weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE)


def _scaled(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    numbers, scales = quantize_rows(x)
    # Scales per row come with bfloat16 results alone.
    product = torch._scaled_mm(
        numbers,
        weight.t(),
        scale_a=scales,
        scale_b=scale[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    ).to(x.dtype)
    return product if bias is None else product.add_(bias)


@triton.jit
def _quantize_kernel(
    x,
    numbers,
    scales,
    size,
    x_stride,
    smallest: tl.constexpr,
    largest: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    is_inside = columns < size
    values = tl.load(x + row * x_stride + columns, is_inside, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0) / largest, smallest)
    tl.store(scales + row, scale)
    scaled = tl.clamp(values / scale, -largest, largest)
    tl.store(numbers + row * size + columns, scaled.to(numbers.dtype.element_ty), is_inside)
