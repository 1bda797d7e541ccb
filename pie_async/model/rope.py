"""Rotary position embedding: its frequencies under each scaling rule, and the rotation.

Source: RoFormer (arXiv:2104.09864) and, for the scaling rules, YaRN (arXiv:2309.00071) and the
Llama 3.1 model card. Numbers agree with transformers' modeling_rope_utils.py, which defines
what the fields in a config.json mean.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import torch
from torch import Tensor

from pie_async.model.config_fields import Fields

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
_KINDS: dict[str, RopeKind] = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
}


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How positions turn into angles."""

    kind: RopeKind
    theta: float
    trained_positions: int
    """Positions the model was trained on before its context was extended."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Scales cosines and sines."""
    truncate: bool = True
    """yarn: round the ramp's borders to whole dimensions."""

    @property
    def reach(self) -> int:
        """Positions that the scaling rule extends the context to."""
        return int(self.trained_positions * self.factor)


def read_rope(fields: Fields, *, max_positions: int) -> RopeConfig:
    """The RoPE part of a config.json, in its old spelling (`rope_theta`, `rope_scaling`) or
    in transformers 5's (`rope_parameters`).

    Raises:
        UnsupportedModel: a kind of scaling that is not computed here.
        ModelError: a number that cannot be.
    """
    name = "rope_parameters" if fields.value("rope_parameters") else "rope_scaling"
    given = fields.value(name) or {}
    if not isinstance(given, dict):
        raise fields.fail(name, f"must be an object, not {given!r}")
    theta = fields.number("rope_theta", 10_000.0, low=1.0)
    scaling = Fields({f"{name}.{key}": value for key, value in given.items()}, "config.json")
    rope = _read_scaling(scaling, name, theta, max_positions)
    for key, value in scaling.unread().items():
        raise scaling.unsupported(key, f"= {value!r} is not supported")
    return rope


def _read_scaling(fields: Fields, name: str, theta: float, max_positions: int) -> RopeConfig:
    spelled = fields.text(f"{name}.type", "default")
    spelled = fields.text(f"{name}.rope_type", spelled)
    kind = _KINDS.get(spelled)
    if kind is None:
        raise fields.unsupported(
            f"{name}.rope_type", f"{spelled!r} is not supported, only {', '.join(_KINDS)}"
        )
    if fields.number(f"{name}.partial_rotary_factor", 1.0) != 1.0:
        raise fields.unsupported(f"{name}.partial_rotary_factor", "other than 1 is not supported")
    theta = fields.number(f"{name}.rope_theta", theta, low=1.0)
    original = f"{name}.original_max_position_embeddings"
    if kind == "default":
        fields.value(original)
        return RopeConfig(kind=kind, theta=theta, trained_positions=max_positions)
    factor = fields.number(f"{name}.factor", low=0.0, high=1e4)
    if kind in ("linear", "dynamic"):
        fields.value(original)
        return RopeConfig(kind=kind, theta=theta, factor=factor, trained_positions=max_positions)
    trained = fields.integer(original, max_positions, high=2**27)
    if kind == "llama3":
        return _read_llama3(fields, name, theta, factor, trained)
    return _read_yarn(fields, name, theta, factor, trained)


def _read_llama3(
    fields: Fields, name: str, theta: float, factor: float, trained: int
) -> RopeConfig:
    low = fields.number(f"{name}.low_freq_factor", high=1e4)
    high = fields.number(f"{name}.high_freq_factor", high=1e4)
    if high <= low:
        raise fields.fail(f"{name}.high_freq_factor", f"must be above low_freq_factor ({low})")
    return RopeConfig(
        kind="llama3",
        theta=theta,
        factor=factor,
        trained_positions=trained,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _read_yarn(fields: Fields, name: str, theta: float, factor: float, trained: int) -> RopeConfig:
    mscale = fields.value(f"{name}.mscale")
    mscale_all = fields.value(f"{name}.mscale_all_dim")
    if mscale and mscale_all:
        inferred = _mscale(factor, fields.number(f"{name}.mscale")) / _mscale(
            factor, fields.number(f"{name}.mscale_all_dim")
        )
    else:
        inferred = _mscale(factor, 1.0)
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        trained_positions=trained,
        beta_fast=fields.number(f"{name}.beta_fast", 32.0, high=1e6),
        beta_slow=fields.number(f"{name}.beta_slow", 1.0, high=1e6),
        attention_factor=fields.number(f"{name}.attention_factor", inferred, high=1e4),
        truncate=fields.flag(f"{name}.truncate", True),
    )


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


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
