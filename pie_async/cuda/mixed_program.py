"""An iteration that also computes prompts, captured: launching its kernels one by one takes the
host longer than a GPU needs for a few hundred tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pie_async.cuda.decode_program import DecodeProgram, most_updates
from pie_async.cuda.fused_model import SPARE_ROWS, FusedModel
from pie_async.cuda.step_inputs import Updates, last_tokens
from pie_async.messages import Row
from pie_async.model.sampling import Needs, Sampled

if TYPE_CHECKING:
    from torch import Tensor

PROMPT_SIZES = (64, 128, 192, 256, 384, 512)
"""What the tokens of such rows, together, are padded to: beside many sequences padding is computed
in earnest (32 requests/s of a 32B shape: without 192 and 384 iterations are a tenth longer, as far
as the simulator can tell). More tokens keep the GPU busy for as long as it takes to launch their
kernels."""
_DECODE_SIZES = (8, 32, 64, 128, 160, 192, 224)
"""Close together where padding is computed in earnest: below, reading the weights takes as long."""


class MixedProgram(DecodeProgram):
    """Rows of one token, padded to a bucket, then rows of several, padded together.

    Behind the fed tokens' numbers lie, of every sampled row, [3, m] where its last token is, its
    lane and the position to sample, then the tiles [t, 4] of `prefill_attention`.

    Args:
        prompt_tokens: one of `PROMPT_SIZES`.
    """

    def __init__(
        self, model: FusedModel, bucket: int, prompt_tokens: int, needs: Needs | None, **how: object
    ) -> None:
        self._prompt_tokens = prompt_tokens
        self._last: Tensor
        self._tiles: Tensor
        super().__init__(model, bucket, needs, **how)  # type: ignore[arg-type]

    def _reserve(self) -> None:
        model, m = self._model, self._bucket + SPARE_ROWS
        tiles = model.attention.most_tiles(self._prompt_tokens, SPARE_ROWS)
        self.fed = model.fed_tokens(
            self._bucket + self._prompt_tokens,
            most_updates(self._bucket) + self._prompt_tokens,
            prompts_at=self._bucket,
        )
        more = model.more_numbers(self.fed, 3 * m + 4 * tiles)
        self._last, self._tiles = more[: 3 * m].view(3, m), more[3 * m :].view(tiles, 4)

    def upload(self, rows: Sequence[Row], updates: Updates) -> None:
        model = self._model
        last = torch.zeros(self._last.shape, dtype=torch.int32)
        last[1] = model.padding_lane
        found = list(last_tokens(rows, self._bucket))
        last[:, : len(found)] = torch.tensor(found, dtype=torch.int32).view(-1, 3).T
        tiles = torch.full(self._tiles.shape, -1, dtype=torch.int32)
        prompts = [row for row in rows if row.num_tokens > 1]
        needed = model.attention.tiles(prompts, self._bucket)
        tiles[: len(needed)] = needed
        updates = model.make_room(updates, self.fed.num_updates)
        model.upload(self.fed, rows, updates, torch.cat((last.flatten(), tiles.flatten())))

    def sampled(self, rows: Sequence[Row], needs: Needs) -> Sampled:
        count = sum(row.is_sampled for row in rows)
        if self._needs is not None:
            return Sampled(self._chosen.tokens[:count], None)
        where, lanes, positions = (numbers[:count] for numbers in self._last)
        hidden = self._hidden.rows(lambda tokens: tokens.index_select(0, where))
        return self._model.choose(hidden, lanes, positions, needs)

    def _embed(self) -> None:
        self._step, self._hidden = self._model.embed(
            self.fed, decode_tokens=self._bucket, tiles=self._tiles
        )

    def _choose(self) -> None:
        assert self._needs is not None
        where, lanes, positions = self._last
        hidden = self._hidden.rows(lambda tokens: tokens.index_select(0, where))
        self._chosen = self._model.choose(hidden, lanes, positions, self._needs)


def mixed_shape(rows: Sequence[Row], largest: int, max_tokens: int) -> tuple[int, int] | None:
    """Bucket and prompt tokens of the program for these rows; None: there is none.

    Args:
        largest: most rows of one token.
        max_tokens: most tokens of an iteration.
    """
    prompts = [row.num_tokens for row in rows if row.num_tokens > 1]
    if len(prompts) > SPARE_ROWS:
        return None
    decode = _next_size(len(rows) - len(prompts), _decode_sizes(largest))
    tokens = _next_size(sum(prompts), _prompt_sizes(max_tokens))
    return None if decode is None or tokens is None else (decode, tokens)


def mixed_shapes(largest: int, max_tokens: int) -> list[tuple[int, int]]:
    """All that `mixed_shape` gives, largest first."""
    return [
        (decode, tokens)
        for tokens in reversed(_prompt_sizes(max_tokens))
        for decode in reversed(_decode_sizes(largest))
    ]


def _decode_sizes(largest: int) -> list[int]:
    return [*(size for size in _DECODE_SIZES if size < largest), largest] if largest else []


def _prompt_sizes(max_tokens: int) -> list[int]:
    return [size for size in PROMPT_SIZES if size <= max_tokens]


def _next_size(number: int, sizes: Sequence[int]) -> int | None:
    return next((size for size in sizes if number <= size), None)
