"""Between the QKV product and attention: split, norm per head, rotation, KV write, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pie_async.cuda.kernels.norm import norm_reference
from pie_async.cuda.kernels.overlap import await_earlier, overlap


def rotate_and_store(
    qkv: Tensor,
    places: Tensor,
    kv: Tensor,
    *,
    num_heads: int,
    rotation: tuple[Tensor, Tensor] | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Write the tokens' keys and values; return their queries.

    Args:
        qkv: [n, (num_heads + 2 kv_heads) * head_dim]: queries, keys, values; rows may be apart.
        places: [n] int64, slot * block_tokens + offset in the block; negative: written nowhere.
        kv: one layer's [slots, 2, kv_heads, block_tokens, head_dim], contiguous within a slot.
        rotation: cosines and sines of `Rotary.factors`, each [n, 1, head_dim]: the halves of the
            cosines are equal, those of the sines opposite. None: no rotation.
        q_norm, k_norm: [head_dim], the RMS norms' weights; both or neither.

    Returns:
        [n, num_heads, head_dim], contiguous.
    """
    _, _, kv_heads, block_tokens, dim = kv.shape
    rows, total = len(qkv), num_heads + 2 * kv_heads
    assert qkv.stride(1) == 1 and qkv.shape[1] == total * dim
    assert kv[0].is_contiguous() and dim % 2 == 0
    assert (q_norm is None) == (k_norm is None)
    queries = torch.empty((rows, num_heads, dim), dtype=qkv.dtype, device=qkv.device)
    if not rows:
        return queries
    cos, sin = rotation if rotation is not None else (None, None)
    assert cos is None or (cos.stride(-1) == 1 and sin is not None and sin.stride() == cos.stride())
    _rotate_and_store_kernel[(rows, triton.cdiv(total, _HEADS))](
        qkv,
        places,
        kv,
        cos,
        sin,
        q_norm,
        k_norm,
        queries,
        qkv.stride(0),
        0 if cos is None else cos.stride(0),
        kv.stride(0),
        eps,
        num_heads=num_heads,
        kv_heads=kv_heads,
        block_tokens=block_tokens,
        dim=dim,
        half_block=triton.next_power_of_2(dim // 2),
        heads_block=_HEADS,
        num_warps=_WARPS,
        **overlap(qkv.device),
    )
    return queries


def rotate_and_store_reference(
    qkv: Tensor,
    places: Tensor,
    kv: Tensor,
    *,
    num_heads: int,
    rotation: tuple[Tensor, Tensor] | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """`rotate_and_store` in plain torch."""
    _, _, kv_heads, block_tokens, dim = kv.shape
    heads = qkv.reshape(len(qkv), num_heads + 2 * kv_heads, dim)
    queries, keys, values = torch.split(heads, [num_heads, kv_heads, kv_heads], 1)
    if q_norm is not None:
        queries = norm_reference(queries, q_norm, None, eps=eps, is_rms=True)
        keys = norm_reference(keys, k_norm, None, eps=eps, is_rms=True)
    if rotation is not None:
        queries, keys = _rotate(queries, *rotation), _rotate(keys, *rotation)
    is_written = places >= 0
    slots, offsets = places[is_written] // block_tokens, places[is_written] % block_tokens
    kv[slots, 0, :, offsets] = keys[is_written]
    kv[slots, 1, :, offsets] = values[is_written]
    return queries.contiguous()


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


_HEADS, _WARPS = 16, 4
"""Per program: with dimension 128 and 2-byte numbers each half is one 16-byte load per thread."""


@triton.jit(do_not_specialize_on_alignment=["places"])
def _rotate_and_store_kernel(
    qkv,
    places,
    kv,
    cos,
    sin,
    q_norm,
    k_norm,
    queries,
    qkv_stride,
    rotation_stride,
    slot_stride,
    eps,
    num_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    block_tokens: tl.constexpr,
    dim: tl.constexpr,
    half_block: tl.constexpr,
    heads_block: tl.constexpr,
    overlaps: tl.constexpr,
):
    await_earlier(overlaps, lets_next_start=True)
    half: tl.constexpr = dim // 2
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * heads_block + tl.arange(0, heads_block))[:, None]
    column = tl.arange(0, half_block)[None, :]
    is_column = column < half
    is_query = head < num_heads
    is_value = head >= num_heads + kv_heads
    is_inside = (head < num_heads + 2 * kv_heads) & is_column
    # What all heads share is loaded for each of them all the same, from the first-level cache:
    # as one row it would have to change hands through shared memory.
    shared = tl.broadcast_to(column, [heads_block, half_block])
    place = tl.load(places + row)
    source = qkv + row * qkv_stride + head * dim + column
    low = tl.load(source, is_inside, 0.0)
    high = tl.load(source + half, is_inside, 0.0)
    dtype = low.dtype
    new_low, new_high = low.to(tl.float32), high.to(tl.float32)
    if cos is not None:
        c = tl.load(cos + row * rotation_stride + shared, is_column, 0.0).to(tl.float32)
        s = tl.load(sin + row * rotation_stride + half + shared, is_column, 0.0).to(tl.float32)
    if q_norm is not None:
        squares = tl.sum(new_low * new_low + new_high * new_high, 1)[:, None]
        scale = tl.rsqrt(squares / dim + eps)
        weight = tl.where(is_query, q_norm, k_norm) + shared
        new_low = _weighted(new_low * scale, weight, is_column, dtype)
        new_high = _weighted(new_high * scale, weight + half, is_column, dtype)
    if cos is not None:
        # As model/rope.py rounds: the first product, then the sum.
        turned_low = (new_low * c).to(dtype).to(tl.float32) - new_high * s
        new_high = (new_high * c).to(dtype).to(tl.float32) + new_low * s
        new_low = turned_low
    low = tl.where(is_value, low, new_low.to(dtype))
    high = tl.where(is_value, high, new_high.to(dtype))
    target = queries + row * (num_heads * dim) + head * dim + column
    tl.store(target, low, is_inside & is_query)
    tl.store(target + half, high, is_inside & is_query)
    # Keys' heads, then values': that is also the order of a slot's.
    kv_row = (head - num_heads) * block_tokens + place % block_tokens
    target = kv + place // block_tokens * slot_stride + kv_row * dim + column
    kept_heads = tl.where(place >= 0, num_heads + 2 * kv_heads, 0)
    is_kept = is_column & (head >= num_heads) & (head < kept_heads)
    tl.store(target, low, is_kept)
    tl.store(target + half, high, is_kept)


@triton.jit
def _weighted(normed, weight, is_column, dtype: tl.constexpr):
    factors = tl.load(weight, is_column, 0.0).to(tl.float32)
    return (normed.to(dtype).to(tl.float32) * factors).to(dtype).to(tl.float32)
