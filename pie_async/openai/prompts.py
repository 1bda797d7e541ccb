"""What a completions request has the model go on with."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from pie_async.errors import InvalidRequest
from pie_async.openai.json_errors import wrong_type

MAX_CHOICES = 2048
"""Most prompts times `n` of one request."""
MAX_TOKEN_IDS = 2**19
"""Most token ids of one request."""

_KINDS = (str, list[str], list[int], list[list[int]])
_TEXT = msgspec.json.Decoder(str)
_TEXTS = msgspec.json.Decoder(list[str])
_TOKENS = msgspec.json.Decoder(list[int])
_TOKEN_LISTS = msgspec.json.Decoder(list[list[int]])
_FIRST_ITEM = re.compile(rb"\[\s*(.)", re.DOTALL)

PromptField = Annotated[
    msgspec.Raw,
    msgspec.Meta(
        description="One text, several texts, one prompt of token ids, or several of these.",
        extra_json_schema={"anyOf": [msgspec.json.schema(kind) for kind in _KINDS]},
    ),
]
"""Kept raw until `read_prompts`: a million empty lists take a second to build."""


def read_prompts(raw: msgspec.Raw, *, n: int) -> list[str] | list[list[int]]:
    """One entry per prompt: texts or token ids.

    Its first item says what a list is to hold, so that each kind is counted before it is built.

    Raises:
        InvalidRequest: of a wrong type, mixed, empty, or too many.
    """
    text = bytes(raw)
    first = _FIRST_ITEM.match(text)
    try:
        if first is None:
            return [_TEXT.decode(text)]
        if first[1] == b"]":
            raise _empty_list()
        if first[1] == b'"':
            _check_choices(least_strings(text), n)
            texts = _TEXTS.decode(text)
            _check_choices(len(texts), n)
            return texts
        _check_token_ids(text.count(b",") + 1)
        if first[1] != b"[":
            return [_TOKENS.decode(text)]
        _check_choices(text.count(b"[") - 1, n)
        token_lists = _TOKEN_LISTS.decode(text)
    except msgspec.ValidationError as error:
        raise wrong_type(str(error), within="prompt") from error
    if not all(token_lists):
        raise _empty_list()
    return token_lists


def least_strings(text: bytes) -> int:
    """How many strings JSON has at least, without reading it: by its quotes but escaped ones, two
    for a string, or one where it ends with a backslash."""
    return (text.count(b'"') - text.count(b'\\"')) // 2


def _empty_list() -> InvalidRequest:
    return InvalidRequest("prompt must not be an empty list", param="prompt")


def _check_choices(prompts: int, n: int) -> None:
    if prompts * n > MAX_CHOICES:
        raise InvalidRequest(
            f"{prompts} prompts with n={n} are more than {MAX_CHOICES} choices; "
            "send several requests",
            param="prompt",
        )


def _check_token_ids(ids: int) -> None:
    if ids > MAX_TOKEN_IDS:
        raise InvalidRequest(
            f"prompt has {ids} token ids; at most {MAX_TOKEN_IDS} are read, send several requests",
            param="prompt",
        )
