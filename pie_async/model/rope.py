"""Rotary position embedding: its frequencies under each scaling rule, and the rotation.

Source: RoFormer (arXiv:2104.09864) and, for the scaling rules, YaRN (arXiv:2309.00071) and the
Llama 3.1 model card. Numbers agree with transformers' modeling_rope_utils.py, which defines
what the fields in a config.json mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pie_async.model.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[head_dim / 2] float32: angle per position of each rotated pair.

    For `dynamic` these are the ones that hold up to the trained positions.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.theta**exponents
    match rope.kind:
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(plain, rope)
        case "yarn":
            return _yarn(plain, rope, head_dim)
        case _:
            return plain


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    # Long wavelengths are stretched, short ones kept, those between blended.
    turns = rope.trained_positions * plain / (2 * math.pi)
    spread = rope.high_freq_factor - rope.low_freq_factor
    kept = ((turns - rope.low_freq_factor) / spread).clamp(0.0, 1.0)
    return (1.0 - kept) * plain / rope.factor + kept * plain


def _yarn(plain: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    def dimension_with(turns: float) -> float:
        """The pair that turns this often over the trained positions."""
        ratio = math.log(rope.trained_positions / (turns * 2 * math.pi))
        return head_dim * ratio / (2 * math.log(rope.theta))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return plain / rope.factor * stretched + plain * (1.0 - stretched)


class Rotary:
    """Turns positions into the factors that rotate queries and keys.

    Factors are computed per iteration, not looked up: a table for a long context costs more
    memory than the layers' norms and saves microseconds.
    """

    def __init__(
        self, rope: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._rope = rope
        self._head_dim = head_dim
        self._dtype = dtype
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)
        self.needs_lengths = rope.kind == "dynamic"

    def factors(self, positions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `rotate` needs for tokens at these positions.

        Args:
            positions: [n] int64.
            lengths: [n] int64, only if `needs_lengths`: the larger of a token's position + 1
                and its prompt's length. transformers recomputes dynamic frequencies from the
                longest sequence of a batch as it grows; this is that rule for a batch of one,
                so a token's rotation depends on its own sequence alone.

        Returns:
            Cosines and sines, each [n, 1, head_dim]; the sines' first half is negated.
        """
        frequencies = self._frequencies
        if self.needs_lengths:
            assert lengths is not None
            frequencies = self._dynamic_frequencies(lengths)
        angles = positions.unsqueeze(1) * frequencies
        cos = angles.cos() * self._rope.attention_factor
        sin = angles.sin() * self._rope.attention_factor
        return (
            torch.cat((cos, cos), 1).to(self._dtype).unsqueeze(1),
            torch.cat((-sin, sin), 1).to(self._dtype).unsqueeze(1),
        )

    def _dynamic_frequencies(self, lengths: Tensor) -> Tensor:
        rope, dim = self._rope, self._head_dim
        stretch = lengths.clamp(min=rope.trained_positions) / rope.trained_positions
        growth = rope.factor * stretch - (rope.factor - 1.0)
        bases = rope.theta * growth ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=lengths.device) / dim
        return 1.0 / bases.unsqueeze(1) ** exponents


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys at their positions.

    Args:
        heads: [n, heads, head_dim].
        cos, sin: from `Rotary.factors`.
    """
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)
