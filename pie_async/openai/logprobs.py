"""Log-probabilities in the two dialects of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pie_async.openai.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    TopLogprob,
)
from pie_async.outputs import Logprob, TokenLogprobs

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot spell; the value OpenAI uses."""


def chat_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int
) -> ChatLogprobs:
    """Chat's form: the tokens in order, each with its `top` likeliest."""
    return ChatLogprobs(
        content=[
            _chat_entry(entry[token], _likeliest(entry, top))
            for token, entry in zip(token_ids, logprobs, strict=True)
        ]
    )


def _chat_entry(chosen: Logprob, likeliest: Sequence[Logprob]) -> ChatTokenLogprob:
    return ChatTokenLogprob(
        token=chosen.decoded_token,
        logprob=_finite(chosen.logprob),
        bytes=_utf8(chosen.decoded_token),
        top_logprobs=[
            TopLogprob(
                token=item.decoded_token,
                logprob=_finite(item.logprob),
                bytes=_utf8(item.decoded_token),
            )
            for item in likeliest
        ],
    )


class CompletionLogprobsWriter:
    """Completions' form, for one choice: keeps the text offset from delta to delta."""

    def __init__(self, top: int, token_text: Callable[[int], str]) -> None:
        self._top = top
        self._token_text = token_text
        self._offset = 0

    def write(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], text: str
    ) -> CompletionLogprobs:
        """The next tokens of the choice and the text they came with.

        A None in `logprobs` is a token that nothing precedes.
        """
        written = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for token, entry in zip(token_ids, logprobs, strict=True):
            own = self._token_text(token) if entry is None else entry[token].decoded_token
            written.text_offset.append(self._offset)
            written.tokens.append(own)
            written.token_logprobs.append(None if entry is None else _finite(entry[token].logprob))
            written.top_logprobs.append(None if entry is None else self._top_of(token, entry))
            if entry is not None or text.startswith(own):  # else: a hidden begin-of-text token
                self._offset += len(own)
        return written

    def _top_of(self, token: int, entry: TokenLogprobs) -> dict[str, float]:
        """By text; the chosen token is always among them, as in OpenAI's API."""
        top: dict[str, float] = {}
        for item in [*_likeliest(entry, self._top), entry[token]]:
            top.setdefault(item.decoded_token, _finite(item.logprob))  # likeliest of equal texts
        return top


def _likeliest(entry: TokenLogprobs, top: int) -> list[Logprob]:
    return sorted((item for item in entry.values() if item.rank <= top), key=_rank)


def _rank(item: Logprob) -> int:
    return item.rank


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _utf8(text: str) -> list[int] | None:
    # A token that is part of a character decodes to U+FFFD; its bytes are not known here.
    return None if "\ufffd" in text else list(text.encode())
