"""y = x W^T (+ b) for few tokens, where reading the weight once is all the work there is.

Who is fastest differs by shape, so there is a choice: torch's own call, another algorithm of
cuBLASLt's list, or one of two Triton kernels: rows of dot products for one token, tiles whose
sums over k are split among programs for several. `tuning.py` measures which.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from pie_async.cuda import cublas_lt
from pie_async.cuda.kernels.overlap import await_earlier, overlap

Choice = tuple[str | int, ...]
"""("torch",), ("lt", algorithm), ("rows", block_n, block_k, warps, stages) or ("split", block_m,
block_n, block_k, warps, stages, splits)."""

TORCH: Choice = ("torch",)
MAX_TOKENS = 256
"""With more, arithmetic counts, and torch's choices are good."""

FEWEST_PROGRAMS = 120
"""About the multiprocessors of the large cards."""

_MAX_SPLIT_TOKENS = 64
_MAX_TILES = 8192
"""Counters; a tile more and torch multiplies."""


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, choice: Choice | None = None
) -> Tensor:
    """x W^T + b, the same bits from the same choice every time; sums in float32.

    A choice that does not fit the operands falls back to torch. Products must not overlap each
    other: they share counters and a workspace.

    Args:
        x: [n, k]; rows may be apart. bias: [out].
        weight: [out, k], contiguous; read before earlier kernels have ended, so it must not be
            what one of them is still writing.

    Returns:
        [n, out], contiguous.
    """
    kind, *sizes = choice or TORCH
    if kind == "lt" and cublas_lt.can_multiply(x, weight):
        product = cublas_lt.multiply(x, weight, bias, str(sizes[0]))
        if product is not None:
            return product
    elif x.dtype == weight.dtype:
        product = multiply(x, weight, None, bias, choice or TORCH)
        if product is not None:
            return product
    return functional.linear(x, weight, bias)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` in plain torch."""
    return functional.linear(x, weight, bias)


def candidates(m: int, n: int, k: int, dtype: torch.dtype) -> list[Choice]:
    """What may be fastest for [m, k] by [n, k], torch first.

    Those in Triton cost a compilation of seconds on a fresh machine, but sizes are arguments at
    run time: one binary serves every shape.
    """
    choices: list[Choice] = [TORCH]
    if m > MAX_TOKENS or dtype not in (torch.float16, torch.bfloat16):
        return choices
    choices += [("lt", each) for each in cublas_lt.algorithms(m, n, k, dtype)]
    return choices + triton_candidates(m, n)


def triton_candidates(m: int, n: int, *, fewest_programs: int = FEWEST_PROGRAMS) -> list[Choice]:
    """Those of `candidates` that `multiply` knows.

    Args:
        fewest_programs: that sums over k are split into, if tiles alone are fewer.
    """
    if m == 1:
        return [("rows", 8, 512, 4, 3), ("rows", 4, 1024, 4, 1)]
    if m > _MAX_SPLIT_TOKENS:
        return []
    block_m = max(16, triton.next_power_of_2(m))
    stages = 4 if block_m < 64 else 3
    tiles = triton.cdiv(n, _BLOCK_N)
    splits = triton.next_power_of_2(triton.cdiv(fewest_programs, tiles))
    return [
        ("split", block_m, _BLOCK_N, _BLOCK_K, 4, stages, each) for each in (splits, 2 * splits)
    ]


def multiply(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, choice: Choice
) -> Tensor | None:
    """x W^T + b by one of the Triton kernels; None where that is not to be.

    Args:
        x: [n, k]; rows may be apart.
        weight: [out, k], of x's dtype or one that is converted to it on the way.
        scale: [out] float32, what the products with each row of the weight are multiplied by.
    """
    kind, *rest = choice
    sizes = [int(each) for each in rest] if kind in ("rows", "split") else []
    if x.stride(1) != 1 or not weight.is_contiguous():
        return None
    if kind == "rows" and x.shape[0] == 1:
        return _by_rows(x, weight, scale, bias, *sizes)
    if kind == "split" and 0 < x.shape[0] <= MAX_TOKENS:
        return _by_splits(x, weight, scale, bias, *sizes)
    return None


_BLOCK_N, _BLOCK_K = 64, 128


def _by_rows(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
    *how: int,
) -> Tensor:
    n, k = weight.shape
    warps, stages = how
    out = torch.empty((1, n), dtype=x.dtype, device=x.device)
    _rows_kernel[(triton.cdiv(n, block_n),)](
        x,
        weight,
        scale,
        bias,
        out,
        n,
        k,
        block_n=block_n,
        block_k=block_k,
        is_even=k % block_k == 0,
        stages=stages,
        num_warps=warps,
        **overlap(x.device),
    )
    return out


def _by_splits(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    block_m: int,
    block_n: int,
    block_k: int,
    *how: int,
) -> Tensor | None:
    (m, k), n = x.shape, weight.shape[0]
    warps, stages, splits = how
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    if tiles > _MAX_TILES:
        return None
    all_steps = triton.cdiv(k, block_k)
    steps = triton.cdiv(all_steps, min(splits, all_steps))
    splits = triton.cdiv(all_steps, steps)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    num_partials = tiles * splits * block_m * block_n if splits > 1 else 0
    _split_kernel[(tiles * splits,)](
        x,
        weight,
        scale,
        bias,
        out,
        torch.empty(num_partials, dtype=torch.float32, device=x.device),
        _counters(x.device),
        m,
        n,
        k,
        x.stride(0),
        splits,
        steps,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        is_even=k % block_k == 0,
        stages=stages,
        precision="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=warps,
        **overlap(x.device),
    )
    return out


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """Zeros; every launch leaves them so."""
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


@triton.jit
def _rows_kernel(
    x,
    weight,
    scale,
    bias,
    out,
    n,
    k,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    is_even: tl.constexpr,
    stages: tl.constexpr,
    overlaps: tl.constexpr,
):
    rows = tl.program_id(0) * block_n + tl.arange(0, block_n)
    columns = tl.arange(0, block_k)
    # Rows past the end read the last one, so that loads need no mask.
    place = weight + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * k + columns[None, :]
    # The first weights come while earlier kernels still run, which do not write them.
    begin: tl.constexpr = block_k if overlaps and is_even else 0
    if begin:
        weights = tl.load(place)
    await_earlier(overlaps)
    if begin:
        sums = weights.to(tl.float32) * tl.load(x + columns).to(tl.float32)[None, :]
    else:
        sums = tl.zeros((block_n, block_k), tl.float32)
    for first in tl.range(begin, k, block_k, num_stages=stages):
        if is_even:
            weights = tl.load(place + first)
            values = tl.load(x + first + columns)
        else:
            is_inside = columns < k - first
            weights = tl.load(place + first, is_inside[None, :], 0.0)
            values = tl.load(x + first + columns, is_inside, 0.0)
        sums += weights.to(tl.float32) * values.to(tl.float32)[None, :]
    product = tl.sum(sums, 1)
    if scale is not None:
        product *= tl.load(scale + rows, rows < n, 0.0)
    if bias is not None:
        product += tl.load(bias + rows, rows < n, 0.0).to(tl.float32)
    tl.store(out + rows, product.to(out.dtype.element_ty), rows < n)


@triton.jit(do_not_specialize=["m", "splits", "steps"])
def _split_kernel(
    x,
    weight,
    scale,
    bias,
    out,
    partials,
    counters,
    m,
    n,
    k,
    x_stride,
    splits,
    steps,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    is_even: tl.constexpr,
    stages: tl.constexpr,
    precision: tl.constexpr,
    overlaps: tl.constexpr,
):
    """The weight is the left operand: the matrix units want 64 rows, and tokens are fewer."""
    await_earlier(overlaps)
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits
    tiles_m = tl.cdiv(m, block_m)
    rows = (tile // tiles_m) * block_n + tl.arange(0, block_n)
    tokens = (tile % tiles_m) * block_m + tl.arange(0, block_m)
    columns = tl.arange(0, block_k)
    weights_at = weight + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * k + columns[None, :]
    values_at = x + tokens.to(tl.int64)[None, :] * x_stride + columns[:, None]
    is_token = (tokens < m)[None, :]
    begin = split * steps * block_k
    end = tl.minimum(begin + steps * block_k, k)
    sums = tl.zeros((block_n, block_m), tl.float32)
    for first in tl.range(begin, end, block_k, num_stages=stages):
        if is_even:
            weights = tl.load(weights_at + first)
            values = tl.load(values_at + first, is_token, 0.0)
        else:
            is_inside = columns < k - first
            weights = tl.load(weights_at + first, is_inside[None, :], 0.0)
            values = tl.load(values_at + first, is_token & is_inside[:, None], 0.0)
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision=precision)
    out_at = out + tokens.to(tl.int64)[None, :] * n + rows[:, None]
    is_out = is_token & (rows < n)[:, None]
    if splits > 1:
        part = block_n * block_m
        place = tl.arange(0, block_n)[:, None] * block_m + tl.arange(0, block_m)[None, :]
        base = partials + tile.to(tl.int64) * splits * part
        tl.store(base + split * part + place, sums)
        tl.debug_barrier()  # one thread's release below speaks for the stores of all
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == splits - 1:
            # The last to arrive adds all parts, in their order and not in that of arrival.
            total = tl.zeros((block_n, block_m), tl.float32)
            for each in range(splits):
                total += tl.load(base + each * part + place, cache_modifier=".cg")
            _store(total, scale, bias, out_at, rows, n, is_out)
            tl.store(counters + tile, 0)
    else:
        _store(sums, scale, bias, out_at, rows, n, is_out)


@triton.jit
def _store(sums, scale, bias, out_at, rows, n, is_out):
    if scale is not None:
        sums *= tl.load(scale + rows, rows < n, 0.0)[:, None]
    if bias is not None:
        sums += tl.load(bias + rows, rows < n, 0.0).to(tl.float32)[:, None]
    tl.store(out_at, sums.to(out_at.dtype.element_ty), is_out)
