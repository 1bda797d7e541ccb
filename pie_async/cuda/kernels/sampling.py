"""The next token of each row: argmax of its logits, with Gumbel noise for rows that draw.

Two stages, so that one row keeps the whole GPU busy: the best of each chunk of the vocabulary,
then the best of those. A candidate travels as one int64 whose order is that of value first,
lowest token id second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pie_async.model.noise import gumbel_noise


def choose(
    logits: Tensor,
    *,
    temperature: Tensor | None,
    keys: Tensor | None = None,
    positions: Tensor | None = None,
    codes: Tensor | None = None,
    masks: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """The token with the largest logit + temperature * noise, the first of equals.

    The noise is that of `model/noise.py`, its integers bit for bit; its logarithms may differ
    by some units in the last place. NaN counts as -inf; a row with nothing above that gives 0.

    Args:
        logits: [n, vocab], any floating dtype; rows may be apart.
        temperature: [n] float32, 0 for greedy rows; None: all are, and the rest is not used.
        keys: [n] int64, from `seed_key`.
        positions: [n] integers, of the tokens being sampled.
        codes: [vocab] int32, from `token_codes`.
        masks: [slots, words] int32, rows contiguous; bit b of word w lets token 32 w + b be taken.
            May lie in the host's memory. None: all tokens may be.
        slots: [n] int64, which mask is whose; -1: none.

    Returns:
        [n] int64.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    tiles = _tiles_per_program(rows, draws=temperature is not None)
    chunks = triton.cdiv(vocab, tiles * _TILE)
    best = torch.empty((rows, chunks), dtype=torch.int64, device=logits.device)
    _best_of_chunk_kernel[(rows, chunks)](
        logits,
        temperature,
        keys,
        positions,
        codes,
        masks,
        slots,
        best,
        vocab,
        logits.stride(0),
        0 if masks is None else masks.stride(0),
        tiles=tiles,
        tile=_TILE,
        num_warps=4,
    )
    chunks_block = triton.next_power_of_2(chunks)
    _best_of_row_kernel[(rows,)](best, out, chunks, chunks_block, num_warps=1)
    return out


def choose_reference(
    logits: Tensor,
    *,
    temperature: Tensor | None,
    keys: Tensor | None = None,
    positions: Tensor | None = None,
    codes: Tensor | None = None,
    masks: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """`choose` in plain torch."""
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if masks is not None:
        assert slots is not None
        ids = torch.arange(scores.shape[1], device=scores.device)
        is_allowed = (masks[slots.clamp(min=0)][:, ids >> 5] >> (ids & 31)) & 1 == 1
        scores = torch.where(is_allowed | (slots < 0).unsqueeze(1), scores, -torch.inf)
    if temperature is not None:
        assert keys is not None and positions is not None and codes is not None
        noise = gumbel_noise(keys, positions.long(), codes)
        scores = scores + noise * temperature.unsqueeze(1)
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    # The first of the largest, which argmax itself does not promise.
    is_largest = scores == scores.amax(-1, keepdim=True)
    ids = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(is_largest, ids, scores.shape[1]).amin(-1)


_TILE = 1024
"""One 16-byte load of 2-byte numbers per thread."""


def _tiles_per_program(rows: int, *, draws: bool) -> int:
    """What is fastest on an H200; for one row of 128256 logits 126 programs."""
    if rows <= 8:
        return 1
    return 4 if draws else 8


@triton.jit(do_not_specialize_on_alignment=["temperature", "keys", "positions", "masks", "slots"])
def _best_of_chunk_kernel(
    logits,
    temperature,
    keys,
    positions,
    codes,
    masks,
    slots,
    best,
    vocab,
    stride,
    mask_words,
    tiles: tl.constexpr,
    tile: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (tiles * tile)
    ids = first + tl.arange(0, tile)
    if temperature is not None:
        heat = tl.load(temperature + row)
        words = _mix64(tl.load(keys + row), tl.load(positions + row).to(tl.int64))
    if masks is not None:
        slot = tl.load(slots + row)
    best_scores = tl.full((tile,), float("-inf"), tl.float32)
    best_ids = ids
    for _ in tl.static_range(tiles):
        is_inside = ids < vocab
        scores = tl.load(logits + row * stride + ids, is_inside, float("-inf")).to(tl.float32)
        if masks is not None:  # noqa: SIM102 - decided when compiling, the inner one by row
            if slot >= 0:
                word = tl.load(masks + slot * mask_words + (ids >> 5), is_inside, 0)
                scores = tl.where((word >> (ids & 31)) & 1 != 0, scores, float("-inf"))
        if temperature is not None:  # noqa: SIM102
            if heat != 0.0:
                code = tl.load(codes + ids, is_inside, 0)
                scores += heat * _gumbel(code.to(tl.uint32, bitcast=True), words)
        # Never true of NaN, nor of an equal one that comes later.
        is_better = scores > best_scores
        best_scores = tl.where(is_better, scores, best_scores)
        best_ids = tl.where(is_better, ids, best_ids)
        ids += tile
    largest = tl.max(best_scores, 0)
    winner = tl.min(tl.where(best_scores == largest, best_ids, vocab), 0)
    # Integers in the order of the numbers: negative ones have all bits but the sign flipped.
    # -0.0 counts as 0.0, as in comparisons.
    bits = tl.where(largest == 0.0, 0.0, largest).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    candidate = (order.to(tl.int64) << 32) | (0x7FFFFFFF - winner).to(tl.int64)
    tl.store(best + row * tl.num_programs(1) + tl.program_id(1), candidate)


@triton.jit
def _best_of_row_kernel(best, out, chunks, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, block)
    lowest: tl.constexpr = -0x8000000000000000
    candidates = tl.load(best + row * chunks + chunk, chunk < chunks, lowest)
    winner = tl.max(candidates, 0)
    tl.store(out + row, 0x7FFFFFFF - (winner & 0x7FFFFFFF))


@triton.jit
def _mix64(key, position):
    """splitmix64's finaliser over key and position, as `model/noise.py` computes it."""
    mixed = (key + position * -0x61C8864680B583EB).to(tl.uint64, bitcast=True)
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    return mixed ^ (mixed >> 31)


@triton.jit
def _gumbel(codes, words):
    """float32 noise from token codes (uint32) and a row's words (uint64)."""
    bits = (codes ^ words.to(tl.uint32)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) + (words >> 32).to(tl.uint32)
    bits = bits * 0x846CA68B
    bits = (bits ^ (bits >> 16)) & 0x7FFFFFFF
    uniform = (bits.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 4.656612873077393e-10
    uniform = tl.minimum(uniform, 0.999999940395355224609375)
    # -log1p(-u) = -log(w - d) with w = 1 - u as rounded and d the rounding error, which is exact;
    # log(w - d) = log(w) - d / w, and where d is not 0, w is over 1/2 and 1 / w about 1 + u.
    rest = 1.0 - uniform
    error = uniform - (1.0 - rest)
    exponential = error * (1.0 + uniform) - tl.log(rest)
    return -tl.log(exponential)
