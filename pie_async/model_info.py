"""What callers may know of the served model."""

from __future__ import annotations

from typing import Literal

import msgspec


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The served model, as loaded."""

    name: str
    """What clients call it."""
    family: str
    dtype: str
    vocab_size: int
    max_model_len: int
    """Most tokens of prompt and output together."""
    num_parameters: int
    weight_bytes: int
    writes_tools_as: Literal["hermes", "llama3"] = "hermes"
    """How it calls tools; see `pie_async.parsing`. Models that know none take to it best."""
    thinks: bool = False
    """Whether it may write `<think>...</think>` before its answer."""
