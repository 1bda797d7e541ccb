"""Randomness without state: noise as a pure function of a seed, a position and a token id.

Adding Gumbel noise to log-probabilities and taking the largest draws from the distribution
(the "Gumbel-max trick"). Unlike inverting a cumulative sum it needs no sum over the row, so
nothing but the row's own logits can move the outcome by even a rounding error.

The integers come from two published finalisers: splitmix64's (Steele, Lea, Flood 2014) over
seed and position, and lowbias32's (C. Wellons, "hash-prospector") over token ids, the latter
keyed twice by the former.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = 2**64 - 1
_GOLDEN64 = 0x9E3779B97F4A7C15
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LOWBIAS = (0x7FEB352D, 0x846CA68B)
_LARGEST_UNIFORM = 1.0 - 2.0**-24


def seed_key(seed: int) -> int:
    """A well-mixed int64 for any integer seed; only its low 64 bits count."""
    mixed = (seed + _GOLDEN64) & _MASK64
    for shift, factor in _SPLITMIX:
        mixed = ((mixed ^ (mixed >> shift)) * factor) & _MASK64
    return _signed(mixed ^ (mixed >> 31), 64)


def token_codes(vocab_size: int, device: torch.device) -> Tensor:
    """[vocab_size] int32: a distinct, well-mixed word per token id, for `gumbel_noise`."""
    codes = torch.arange(vocab_size, dtype=torch.int32)
    codes ^= _shift_right(codes, 16)
    for factor, shift in zip(_LOWBIAS, (15, 16), strict=True):
        codes *= _signed(factor, 32)
        codes ^= _shift_right(codes, shift)
    return codes.to(device)


def gumbel_noise(keys: Tensor, positions: Tensor, codes: Tensor) -> Tensor:
    """Independent standard Gumbel noise, finite.

    Args:
        keys: [n] int64, from `seed_key`.
        positions: [n] int64.
        codes: [vocab] int32, from `token_codes`.

    Returns:
        [n, vocab] float32; entry (i, t) depends on keys[i], positions[i] and codes[t] alone.
    """
    words = _mix64(keys, positions).view(torch.int32).view(-1, 2, 1)
    bits = codes ^ words[:, 0]
    bits *= _signed(_LOWBIAS[0], 32)
    bits ^= _shift_right(bits, 15)
    bits += words[:, 1]
    bits *= _signed(_LOWBIAS[1], 32)
    bits ^= _shift_right(bits, 16)
    bits &= 0x7FFFFFFF
    # Small uniforms decide (they become the small exponentials that win), so they must stay
    # exact down to 2**-32; near 1, float32's spacing is enough, but 1 itself would give -inf.
    uniform = bits.float().add_(0.5).mul_(2.0**-31).clamp_(max=_LARGEST_UNIFORM)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix64(keys: Tensor, positions: Tensor) -> Tensor:
    mixed = keys + positions * _signed(_GOLDEN64, 64)
    for shift, factor in _SPLITMIX:
        mixed ^= _shift_right(mixed, shift)
        mixed *= _signed(factor, 64)
    mixed ^= _shift_right(mixed, 31)
    return mixed


def _shift_right(words: Tensor, shift: int) -> Tensor:
    """A shift that brings in zeros; torch's own copies the sign."""
    width = torch.iinfo(words.dtype).bits
    return (words >> shift).bitwise_and_((1 << (width - shift)) - 1)


def _signed(word: int, bits: int) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word
