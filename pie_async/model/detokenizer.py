"""Text from tokens as they come, never half a character.

Most decoders turn each token into bytes on its own; then decoding a stream is a table look-up
and an incremental UTF-8 decoder (`TokenBytes`). Any other decoder is asked again and again for
the text of a short window of tokens, of which only the end is new.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_BROKEN = "\ufffd"
_WINDOW_TOKENS = 8
_CHARACTER_TOKENS = 4
"""A character has at most four bytes, hence at most four tokens."""


class Detokenizer(Protocol):
    """The text of one sequence's output, piece by piece.

    For output that is valid UTF-8 the pieces join to exactly what decoding prompt and output
    together adds to decoding the prompt; a character that the prompt leaves incomplete counts
    as output. Broken bytes become replacement characters.
    """

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""

    def flush(self) -> str:
        """What is left at the end: a replacement character for an incomplete one."""


class TokenBytes:
    """The bytes of every token, for decoders that treat each token on its own.

    Attributes:
        leading_spaces: spaces that the decoder drops from the beginning of a text.
    """

    def __init__(self, backend: Backend, rules: _Rules) -> None:
        self.leading_spaces = rules.leading_spaces
        self._backend = backend
        self._rules = rules
        self._bytes: dict[int, bytes] = {}
        self._special = {
            token for token, added in backend.get_added_tokens_decoder().items() if added.special
        }

    @classmethod
    def of(cls, backend: Backend) -> TokenBytes | None:
        """The table, or None if this tokenizer's decoder is of another kind."""
        if backend.decoder is None:
            return None
        rules = _read_rules(json.loads(backend.decoder.__getstate__()))
        return None if rules is None else cls(backend, rules)

    def get(self, token: int, *, skip_special_tokens: bool) -> bytes:
        """b"" for special tokens, if they are skipped, and for ids outside the vocabulary."""
        if skip_special_tokens and token in self._special:
            return b""
        if (known := self._bytes.get(token)) is None:
            text = self._backend.id_to_token(token)
            known = self._bytes[token] = b"" if text is None else self._rules.to_bytes(text)
        return known


class ByteDetokenizer:
    """A `Detokenizer` over `TokenBytes`: a look-up per token.

    Broken bytes are replaced as Python and Rust do it, one replacement character for each
    maximal beginning of a character.
    """

    def __init__(
        self, table: TokenBytes, prompt_tokens: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._table = table
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces_to_drop = table.leading_spaces
        for token in prompt_tokens:
            if not self._spaces_to_drop:
                break
            self.push(token)
        self._utf8.reset()
        for token in prompt_tokens[-_WINDOW_TOKENS:]:
            self._utf8.decode(table.get(token, skip_special_tokens=skip_special_tokens))

    def push(self, token: int) -> str:
        text = self._utf8.decode(self._table.get(token, skip_special_tokens=self._skip))
        return self._without_leading_spaces(text) if self._spaces_to_drop else text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _without_leading_spaces(self, text: str) -> str:
        while self._spaces_to_drop and text:
            if text[0] != " ":
                self._spaces_to_drop = 0
                break
            self._spaces_to_drop -= 1
            text = text[1:]
        return text


class WindowDetokenizer:
    """A `Detokenizer` for any decoder: decodes a window of recent tokens at each push.

    The window begins with tokens whose text is out already, because decoders treat the first
    token of a text differently.
    """

    def __init__(
        self, backend: Backend, prompt_tokens: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._backend = backend
        self._skip = skip_special_tokens
        start, end = self._boundaries(prompt_tokens)
        self._window = list(prompt_tokens[start:])
        self._num_read = end - start
        self._read_text = self._decode(self._window[: self._num_read])
        # The last token of the prompt may hold more than the character it leaves incomplete.
        whole = self._decode(self._window).rstrip(_BROKEN)
        if whole.startswith(self._read_text):
            self._read_text = whole

    def push(self, token: int) -> str:
        self._window.append(token)
        num_unread = len(self._window) - self._num_read
        text = self._decode(self._window)
        if text.endswith(_BROKEN) and num_unread < 2 * _CHARACTER_TOKENS:
            return ""
        return self._release(text)

    def flush(self) -> str:
        return self._release(self._decode(self._window))

    def _release(self, text: str) -> str:
        if text.startswith(self._read_text):
            new = text[len(self._read_text) :]
        else:  # broken bytes spoil what decoded well without them
            new = self._decode(self._window[self._num_read :])
        if new:
            self._window = self._window[self._num_read :]
            self._num_read = len(self._window)
            self._read_text = self._decode(self._window)
        return new

    def _boundaries(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Where to begin and end reading the prompt's last tokens, so as to split no character.

        What is read has some text if the prompt has.
        """
        size = _WINDOW_TOKENS
        while size < len(tokens) and not self._decode(tokens[-size:]):
            size *= 2
        first, last = max(len(tokens) - size, 0), len(tokens)
        for end in range(last, max(last - _CHARACTER_TOKENS, 0), -1):
            for start in range(first, max(first - _CHARACTER_TOKENS, -1), -1):
                text = self._decode(tokens[start:end])
                if not text.startswith(_BROKEN) and not text.endswith(_BROKEN):
                    return start, end
        return first, last

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=self._skip)


class _Rules(Protocol):
    leading_spaces: int

    def to_bytes(self, token: str) -> bytes: ...


class _ByteLevel:
    """GPT-2's alphabet: one printable character stands for each byte."""

    leading_spaces = 0

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in set(printable)]
        self._bytes = {chr(byte): byte for byte in printable}
        self._bytes |= {chr(256 + index): byte for index, byte in enumerate(others)}

    def to_bytes(self, token: str) -> bytes:
        try:
            return bytes(self._bytes[char] for char in token)
        except KeyError:  # an added token, spelled as text
            return token.encode()


class _ByteFallback:
    """SentencePiece's way: text with replacements, and tokens like <0x0A> for single bytes."""

    def __init__(self, replacements: Sequence[tuple[str, str]], leading_spaces: int) -> None:
        self.leading_spaces = leading_spaces
        self._replacements = replacements

    def to_bytes(self, token: str) -> bytes:
        for old, new in self._replacements:
            token = token.replace(old, new)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes.fromhex(token[3:5])
            except ValueError:
                pass
        return token.encode()


def _read_rules(decoder: dict[str, Any]) -> _Rules | None:
    """The rules of a decoder from tokenizer.json that treats tokens on their own, else None."""
    parts: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    if [part["type"] for part in parts] == ["ByteLevel"]:
        return _ByteLevel()
    replacements = []
    while parts and parts[0]["type"] == "Replace" and "String" in parts[0]["pattern"]:
        replacements.append((parts[0]["pattern"]["String"], parts[0]["content"]))
        parts = parts[1:]
    match [part["type"] for part in parts]:
        case ["ByteFallback", "Fuse"]:
            return _ByteFallback(replacements, 0)
        case ["ByteFallback", "Fuse", "Strip"]:
            strip = parts[2]
            if strip["content"] == " " and strip["stop"] == 0:
                return _ByteFallback(replacements, strip["start"])
    return None
