"""Telling a chat template's control tokens from text that merely spells one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tokenizers import Tokenizer as Backend

if TYPE_CHECKING:
    from tokenizers import Encoding


class ControlTokens:
    """A tokenizer's special tokens, and how to encode text that spells them as mere text."""

    def __init__(self, backend: Backend) -> None:
        added = backend.get_added_tokens_decoder()
        special = {token: entry for token, entry in added.items() if entry.special}
        contents = sorted((entry.content for entry in special.values()), key=len, reverse=True)
        self._ids = frozenset(special)
        self._backend = backend
        self._plain: Backend | None = None
        self._pattern: re.Pattern[str] | None = None
        if not any(entry.normalized for entry in special.values()):
            self._pattern = re.compile("|".join(map(re.escape, contents)) or r"(?!)")

    def is_in(self, text: str) -> bool:
        return bool(self._spans(text))

    def mark(self, text: str, marks: str) -> str:
        """Put every control token spelled in `text` between the two marks."""
        pieces, end = [], 0
        for first, last in self._spans(text):
            pieces += [text[end:first], marks[0], text[first:last], marks[1]]
            end = last
        return "".join((*pieces, text[end:]))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._plain is None:
            plain = Backend.from_str(self._backend.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        encoding = self._plain.encode(text, add_special_tokens=add_special_tokens)
        # A vocabulary may hold a control token as an ordinary entry, too.
        return [token for token in encoding.ids if token not in self._ids]

    def _spans(self, text: str) -> list[tuple[int, int]]:
        if self._pattern is not None:
            return [match.span() for match in self._pattern.finditer(text)]
        # Tokens that match normalised text can only be found by the tokenizer itself.
        encoding: Encoding = self._backend.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return [span for token, span in spans if token in self._ids and span[0] < span[1]]


_PRIVATE_USE = tuple(map(chr, range(0xE000, 0xF900)))


def unused_characters(text: str) -> str | None:
    """Two characters that occur nowhere in `text` and that no template looks for.

    None if there are no such two: a text that holds thousands of private characters.
    """
    used = set(re.findall(f"[{_PRIVATE_USE[0]}-{_PRIVATE_USE[-1]}]", text))
    free = [char for char in _PRIVATE_USE if char not in used]
    return "".join(free[:2]) if len(free) >= 2 else None


def split_marked(text: str, marks: str) -> list[tuple[str, bool]]:
    """The text in parts, and whether each was between marks; the marks are gone."""
    pieces = re.split(f"{marks[0]}([^{marks}]*){marks[1]}", text)
    parts = [(re.sub(f"[{marks}]", "", piece), bool(i % 2)) for i, piece in enumerate(pieces)]
    return [part for part in parts if part[0]]
