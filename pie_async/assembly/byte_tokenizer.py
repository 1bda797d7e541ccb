"""A tokenizer for models that have none: the simulated one, and shapes with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pie_async.assembly.parts import ChatMessage
from pie_async.chat_options import ChatOptions
from pie_async.request_stream import TextDecoder

if TYPE_CHECKING:
    from llguidance import LLTokenizer


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
        self,
        messages: Sequence[ChatMessage],
        *,
        most_tokens: int | None = None,
        options: ChatOptions | None = None,
    ) -> list[int]:
        del most_tokens, options  # there is no template to tell
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return "".join(map(self.token_text, ids))

    def has_token(self, text: str) -> bool:
        del text
        return False

    def token_text(self, token: int) -> str:
        return chr(token) if 32 <= token < 127 else chr(ord("a") + token % 26)

    def guide_tokens(self, vocab_size: int, end_ids: Sequence[int]) -> LLTokenizer:
        """See `model.guides.Spelling`: printable ASCII. Of tokens that read alike one will do."""
        from llguidance import LLTokenizer, TokenizerWrapper

        end = end_ids[0] if end_ids else 127
        tokens = _AsciiTokens([bytes((i,)) if 32 <= i < 127 else b"" for i in range(end)], end)
        return LLTokenizer(TokenizerWrapper(tokens), n_vocab=vocab_size)

    def detokenizer(
        self, prompt_tokens: Sequence[int], *, skip_special_tokens: bool = True
    ) -> TextDecoder:
        del prompt_tokens, skip_special_tokens
        return _ByteDecoder(self.token_text)


class _AsciiTokens:
    """As `TokenizerWrapper` wants it."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], end: int) -> None:
        self.tokens = [*tokens, b"<end>"]
        self.eos_token_id = end
        self.special_token_ids = [end]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


class _ByteDecoder:
    def __init__(self, token_text: Callable[[int], str]) -> None:
        self.push = token_text

    def flush(self) -> str:
        return ""
