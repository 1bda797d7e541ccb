"""What an engine is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from pie_async.chat_options import ChatOptions
from pie_async.cuda.memory_budget import GpuMemory
from pie_async.device.protocol import Device, Guides
from pie_async.model_info import ModelInfo
from pie_async.request_stream import TextDecoder

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from pie_async.model.guides import GuideCompiler

Progress = Callable[[int, int], None]
"""Told (bytes loaded, bytes in all)."""

ChatMessage = Mapping[str, Any]
"""`role`, `content`, and what templates read besides: `tool_calls` and the like."""


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer (`model/tokenizer.py`)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    def encode(
        self, text: str, *, add_special_tokens: bool = True, most_tokens: int | None = None
    ) -> list[int]: ...
    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        most_tokens: int | None = None,
        options: ChatOptions | None = None,
    ) -> list[int]: ...
    def has_token(self, text: str) -> bool: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def token_text(self, token: int) -> str: ...
    def guide_tokens(self, vocab_size: int, end_ids: Sequence[int]) -> LLTokenizer: ...
    def detokenizer(
        self, prompt_tokens: Sequence[int], *, skip_special_tokens: bool = True
    ) -> TextDecoder: ...


class Limits(NamedTuple):
    """What an iteration may hold at most."""

    token_budget: int
    max_running_sequences: int


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model on a device that is not started yet."""

    device: Device
    tokenizer: Tokenizer
    model: ModelInfo
    eos_ids: frozenset[int]
    limits: Limits
    guides: Guides
    """Make the masks of guided sequences."""
    compiler: GuideCompiler
    """Theirs, to see at the door whether a guide is valid."""
    decode_floor_s: float = 0.0
    """No iteration is shorter: it reads the weights. 0: unknown."""
    gpu_memory: Callable[[], GpuMemory] | None = None
    """Where the card's memory is, as of the call; None without a card."""
