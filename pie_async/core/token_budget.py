"""How many tokens an iteration may process so that nobody waits too long for the next token."""

from __future__ import annotations

import math

import msgspec

from pie_async.errors import ConfigError

UNLIMITED_TOKENS = 8192
"""Where nobody asks for a target: products gain nothing from more rows than that."""
LEAST_PREFILL_TOKENS = 64
"""Beside a full decode batch, so that prompts get on however tight the target is."""
ATTENTION_SHARE = 0.2
"""Of a prefill's time at a context of some thousand tokens; the rest is matrix products."""


class IterationCost(msgspec.Struct, frozen=True, kw_only=True):
    """What an iteration costs on one device with one model."""

    weight_bytes: int
    """Read by every iteration."""
    kv_bytes: int
    """Read by the decode rows of a busy iteration."""
    flops_per_token: float
    """Of matrix products."""
    read_bytes_per_s: float
    flops_per_s: float
    """Of large matrix products, as they are reached."""

    @property
    def decode_s(self) -> float:
        """An iteration that only decodes; such iterations are bound by what they read."""
        return (self.weight_bytes + self.kv_bytes) / self.read_bytes_per_s


def tokens_within(target_s: float, cost: IterationCost, *, decode_rows: int) -> int:
    """The largest token budget whose iterations keep the target, beside a busy decode batch.

    Args:
        target_s: how long an iteration may take.
        decode_rows: most sequences that decode in it; their tokens are in the budget.

    Raises:
        ConfigError: no iteration can be that short: the weights alone take longer to read.
    """
    weights_s = cost.weight_bytes / cost.read_bytes_per_s
    if target_s <= weights_s:
        raise ConfigError(
            f"itl_target_s is {target_s:g}, but reading the weights takes {weights_s:.4f} s in "
            "every iteration; raise it or choose a smaller model",
            option="itl_target_s",
        )
    left_s = (1 - ATTENTION_SHARE) * (target_s - cost.decode_s)
    prefill = math.floor(left_s * cost.flops_per_s / cost.flops_per_token)
    return decode_rows + max(LEAST_PREFILL_TOKENS, min(prefill, UNLIMITED_TOKENS - decode_rows))
