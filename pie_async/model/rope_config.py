"""The part of a config.json that says how positions turn into angles. Loads no torch: a server's
process reads it too.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

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
