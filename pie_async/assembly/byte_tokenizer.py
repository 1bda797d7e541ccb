"""A tokenizer for models that have none: the simulated one, and shapes with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pie_async.assembly.parts import ChatMessage
from pie_async.request_stream import TextDecoder


class ByteTokenizer:
    """Of models without one (simulated or random): text is its bytes; other ids read as letters."""

    eos_ids: tuple[int, ...] = ()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(
        self, text: str, *, add_special_tokens: bool = True, most_tokens: int | None = None
    ) -> list[int]:
        del add_special_tokens, most_tokens  # there are none; counting costs as much as encoding
        return list(text.encode())

    def encode_chat(
        self, messages: Sequence[ChatMessage], *, most_tokens: int | None = None
    ) -> list[int]:
        del most_tokens
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return "".join(map(self.token_text, ids))

    def token_text(self, token: int) -> str:
        return chr(token) if 32 <= token < 127 else chr(ord("a") + token % 26)

    def detokenizer(
        self, prompt_tokens: Sequence[int], *, skip_special_tokens: bool = True
    ) -> TextDecoder:
        del prompt_tokens, skip_special_tokens
        return _ByteDecoder(self.token_text)


class _ByteDecoder:
    def __init__(self, token_text: Callable[[int], str]) -> None:
        self.push = token_text

    def flush(self) -> str:
        return ""
