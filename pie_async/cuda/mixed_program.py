"""An iteration that also computes prompts, captured: launching its kernels one by one takes the
host longer than a GPU needs for a few hundred tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pie_async.core.batch_shapes import SPARE_ROWS
from pie_async.cuda.decode_program import DecodeProgram, most_updates
from pie_async.cuda.fused_decoder import Hidden
from pie_async.cuda.fused_model import FusedModel
from pie_async.cuda.step_inputs import Updates, last_tokens
from pie_async.messages import Row

if TYPE_CHECKING:
    from torch import Tensor


class MixedProgram(DecodeProgram):
    """Rows of one token, padded to a bucket, then rows of several, padded together.

    Behind the fed tokens' numbers lie, of every sampled row, [3, m] where its last token is, its
    lane and the position to sample, then the tiles [t, 4] of `prefill_attention`.

    Args:
        prompt_tokens: one of `core/batch_shapes.py`'s `PROMPT_SIZES`.
    """

    def __init__(self, model: FusedModel, bucket: int, prompt_tokens: int, **how: Any) -> None:
        self._prompt_tokens = prompt_tokens
        self._last: Tensor
        self._tiles: Tensor
        super().__init__(model, bucket, **how)

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

    def _sampled_rows(self, rows: Sequence[Row]) -> Callable[[Tensor], Tensor]:
        count = sum(row.is_sampled for row in rows)
        return lambda tensor: tensor[:count]

    def _lanes_and_positions(self) -> tuple[Tensor, Tensor]:
        _, lanes, positions = self._last
        return lanes, positions

    def _last_hidden(self) -> Hidden:
        where = self._last[0]
        return self._hidden.rows(lambda tokens: tokens.index_select(0, where))

    def _embed(self) -> None:
        self._step, self._hidden = self._model.embed(
            self.fed, decode_tokens=self._bucket, tiles=self._tiles
        )
