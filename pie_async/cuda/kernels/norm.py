"""RMS norm and layer norm of rows, alone or behind the residual sum.

One program takes one row and reads it once, so a row must fit its registers; hidden sizes of
decoders do. Weights and biases are read before earlier kernels have ended: none of those may
still be writing them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from pie_async.cuda.kernels.overlap import await_earlier, overlap


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, is_rms: bool
) -> Tensor:
    """The norm of each row, as `model/layers.py` rounds it.

    Args:
        x: [n, size]; rows may be apart.
        weight, bias: [size]; a bias only without `is_rms`.

    Returns:
        [n, size], contiguous.
    """
    return _launch(x, None, weight, bias, eps, is_rms)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    is_rms: bool,
) -> Tensor:
    """Add x to the residual in place, rounding to its dtype; return the norm of that sum.

    Args:
        x, residual: [n, size]; rows may be apart.
        weight, bias: [size]; a bias only without `is_rms`.

    Returns:
        [n, size], contiguous.
    """
    return _launch(x, residual, weight, bias, eps, is_rms)


def norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, is_rms: bool
) -> Tensor:
    """`norm` in plain torch."""
    if not is_rms:
        return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    normed = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
    return normed if weight is None else normed * weight


def add_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    is_rms: bool,
) -> Tensor:
    """`add_norm` in plain torch."""
    return norm_reference(residual.add_(x), weight, bias, eps=eps, is_rms=is_rms)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    is_rms: bool,
) -> Tensor:
    rows, size = x.shape
    assert x.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
    assert bias is None or not is_rms
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(size)
        _norm_kernel[(rows,)](
            x,
            residual,
            weight,
            bias,
            out,
            size,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            is_rms=is_rms,
            block=block,
            num_warps=num_warps(block),
            **overlap(x.device),
        )
    return out


def num_warps(block: int) -> int:
    """For one row: two loads of 16 bytes per thread and tensor of 2-byte numbers, up to 16 warps.

    One load in twice the warps is as fast for few rows, a tenth slower for thousands (H200).
    """
    return min(max(block // 512, 1), 16)


@triton.jit
def _norm_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    size,
    x_stride,
    residual_stride,
    eps,
    is_rms: tl.constexpr,
    block: tl.constexpr,
    overlaps: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    is_inside = columns < size
    if weight is not None:
        factors = tl.load(weight + columns, is_inside, 0.0).to(tl.float32)
    if bias is not None:
        offsets = tl.load(bias + columns, is_inside, 0.0).to(tl.float32)
    await_earlier(overlaps, lets_next_start=True)
    values = tl.load(x + row * x_stride + columns, is_inside, 0.0)
    dtype = values.dtype
    wide = values.to(tl.float32)
    if residual is not None:
        kept = residual + row * residual_stride + columns
        summed = (wide + tl.load(kept, is_inside, 0.0).to(tl.float32)).to(dtype)
        tl.store(kept, summed, is_inside)
        wide = summed.to(tl.float32)
    if is_rms:
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
        normed = (wide * scale).to(dtype).to(tl.float32)
    else:
        # Around the mean, in a second sum: squares of large means would cancel.
        centred = tl.where(is_inside, wide - tl.sum(wide, 0) / size, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / size + eps)
    if weight is not None:
        normed *= factors
    if bias is not None:
        normed += offsets
    tl.store(out + row * size + columns, normed.to(dtype), is_inside)
