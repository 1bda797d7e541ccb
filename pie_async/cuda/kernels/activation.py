"""The MLP's activation, with the product of a gated one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from pie_async.cuda.kernels.overlap import await_earlier, overlap

if TYPE_CHECKING:
    from pie_async.model.config import Activation


def activate(x: Tensor, activation: Activation, is_gated: bool) -> Tensor:
    """act(x), or act(gate) * up; computed in float32, each factor rounded like `model/layers.py`.

    Args:
        x: [n, inner], or gates and ups side by side, [n, 2 * inner]; rows may be apart.

    Returns:
        [n, inner], contiguous.
    """
    rows, width = x.shape
    assert x.stride(1) == 1
    inner = width // 2 if is_gated else width
    out = torch.empty((rows, inner), dtype=x.dtype, device=x.device)
    if rows:
        _activate_kernel[(rows, triton.cdiv(inner, _BLOCK))](
            x,
            out,
            inner,
            x.stride(0),
            activation,
            is_gated,
            _BLOCK,
            num_warps=4,
            **overlap(x.device),
        )
    return out


def activate_reference(x: Tensor, activation: Activation, is_gated: bool) -> Tensor:
    """`activate` in plain torch."""
    if is_gated:
        gate, up = x.chunk(2, -1)
        return activate_reference(gate, activation, False) * up
    match activation:
        case "silu":
            return functional.silu(x)
        case "relu":
            return functional.relu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")


_BLOCK = 1024
"""Per program: one 16-byte load of 2-byte numbers per thread."""


@triton.jit
def _activate_kernel(
    x,
    out,
    inner,
    stride,
    activation: tl.constexpr,
    is_gated: tl.constexpr,
    block: tl.constexpr,
    overlaps: tl.constexpr,
):
    await_earlier(overlaps, lets_next_start=True)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    is_inside = columns < inner
    values = tl.load(x + row * stride + columns, is_inside, 0.0)
    dtype = values.dtype
    if is_gated:
        ups = tl.load(x + row * stride + inner + columns, is_inside, 0.0)
    active = _activated(values.to(tl.float32), activation).to(dtype)
    if is_gated:
        active = (active.to(tl.float32) * ups.to(tl.float32)).to(dtype)
    tl.store(out + row * inner + columns, active, is_inside)


@triton.jit
def _activated(x, activation: tl.constexpr):
    if activation == "silu":
        active = x / (1.0 + tl.exp(-x))
    elif activation == "relu":
        active = tl.where(x < 0.0, 0.0, x)  # keeps NaN, as a maximum would not
    elif activation == "gelu":
        active = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y)), y = sqrt(2 / pi) (x + 0.044715 x^3)
        doubled = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        active = x / (1.0 + tl.exp(-doubled))
    return active
