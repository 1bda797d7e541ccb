"""Logprobs of prompt tokens, across the chunks in which a prompt is fed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from pie_async.ids import SequenceId
from pie_async.messages import PromptLogprobs, Row, SampledToken
from pie_async.model.sampling import TokenLogprobs, token_logprobs
from pie_async.model.transfer import download, upload

_ROWS_AT_ONCE = 64
"""Positions whose logits exist together: a long chunk's over a large vocabulary would not fit."""


class PromptScorer:
    """Scores each prompt token by the logits of the position before it.

    A chunk's last position predicts a token that comes with the next chunk; its hidden state
    is kept until then, by sequence, since a sequence may change lanes in between.

    Args:
        logits: from [n, hidden] of the last layer to [n, vocab] float32.
        kept: most sequences between two chunks; beyond it the oldest one is forgotten (those
            that were cancelled there never come back), and its next chunk's first token is
            left out.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], *, kept: int) -> None:
        self._logits = logits
        self._most = kept
        self._kept: OrderedDict[SequenceId, tuple[int, Tensor]] = OrderedDict()

    def score(
        self, row: Row, hidden: Tensor, prompt_len: int, top: int
    ) -> Callable[[], PromptLogprobs] | None:
        """Scores of the row's tokens that can be scored now; None if there are none.

        Never waits for the device; the scores may be read once it got so far.

        Args:
            row: fed token ids, at least the first of them a prompt token.
            hidden: [row.num_tokens, hidden] of the last layer.
            top: likeliest tokens to report beside each.
        """
        position, before = self._kept.pop(row.sequence, (-1, hidden[:0]))
        first, tokens = row.start, row.tokens[: prompt_len - row.start]
        if position == row.start - 1 and row.start > 0:
            hidden = torch.cat((before, hidden))
        else:
            first, tokens = first + 1, tokens[1:]
        if row.start + row.num_tokens < prompt_len:
            self._keep(row.sequence, row.start + row.num_tokens - 1, hidden[-1:].clone())
        if not tokens:
            return None
        parts = list(self._score(row.sequence, tokens, hidden, top))
        return partial(_joined, row.sequence, first, parts)

    def _keep(self, sequence: SequenceId, position: int, hidden: Tensor) -> None:
        self._kept[sequence] = position, hidden
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def _score(
        self, sequence: SequenceId, tokens: Sequence[int], hidden: Tensor, top: int
    ) -> Iterator[Iterator[SampledToken]]:
        for first in range(0, len(tokens), _ROWS_AT_ONCE):
            part = upload(tokens[first : first + _ROWS_AT_ONCE], hidden.device)
            logits = self._logits(hidden[first : first + len(part)])
            scores = token_logprobs(logits, part, top)
            yield reported([sequence] * len(part), part, scores, [top] * len(part))


def _joined(
    sequence: SequenceId, first: int, parts: Iterable[Iterable[SampledToken]]
) -> PromptLogprobs:
    return PromptLogprobs(sequence, first, tuple(chain.from_iterable(parts)))


def reported(
    sequences: Sequence[SequenceId],
    tokens: Tensor,
    scores: TokenLogprobs | None,
    tops: Sequence[int | None],
) -> Iterator[SampledToken]:
    """Tokens as messages, with logprobs for rows that asked for them.

    Starts to bring them to the host at once; iterate once the device got so far.

    Args:
        tokens: [n] int64.
        scores: of these tokens; None if no row asked.
        tops: per row, how many of the likeliest tokens; None: no logprobs at all.
    """
    host_scores = None if scores is None else TokenLogprobs(*map(download, scores))
    return _messages(sequences, download(tokens), host_scores, tops)


def _messages(
    sequences: Sequence[SequenceId],
    tokens: Tensor,
    scores: TokenLogprobs | None,
    tops: Sequence[int | None],
) -> Iterator[SampledToken]:
    ids = tokens.tolist()
    if scores is None:
        for sequence, token in zip(sequences, ids, strict=True):
            yield SampledToken(sequence, token)
        return
    columns = (ids, *(column.tolist() for column in scores))
    for sequence, top, token, logprob, rank, top_ids, top_logprobs in zip(
        sequences, tops, *columns, strict=True
    ):
        if top is None:
            yield SampledToken(sequence, token)
        else:
            pairs = tuple(zip(top_ids, top_logprobs, strict=True))[:top]
            yield SampledToken(sequence, token, logprob, rank, pairs)
