"""A decode iteration as captured pieces: its layers, and the ways of sampling after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pie_async.cuda.fused_decoder import Hidden
from pie_async.cuda.fused_model import FusedModel
from pie_async.cuda.graphs import Piece, Work, capture
from pie_async.cuda.step_attention import StepAttention
from pie_async.cuda.step_inputs import FedTokens, Updates
from pie_async.messages import Row
from pie_async.model.sampling import Needs, Sampled
from pie_async.model.transfer import upload

if TYPE_CHECKING:
    from torch import Tensor


class _Sampling(NamedTuple):
    """One way of sampling, captured."""

    piece: Piece
    tokens: Tensor
    """[rows] int64, overwritten by each replay."""


class DecodeProgram:
    """An iteration of one-token rows, padded to a bucket.

    Attributes:
        fed: where its numbers are uploaded to.
    """

    def __init__(
        self, model: FusedModel, bucket: int, *, is_staged: bool, has_run: bool, pool: Any
    ) -> None:
        """Run its layers once over padding, then capture them.

        Args:
            is_staged: a piece per layer group instead of one for all layers.
            has_run: its kernels ran with these shapes: they were captured in other pieces.
            pool: the graphs' memory.

        Raises:
            torch.OutOfMemoryError: see `capture`.
        """
        self._model = model
        self._bucket = bucket
        self._pool = pool
        self.fed: FedTokens
        self._step: StepAttention
        self._hidden: Hidden
        self._head_input: Tensor
        self._samplings: dict[Needs, _Sampling] = {}
        layout = model.layout
        groups = [layout.group(g) for g in range(layout.num_groups)] if is_staged else []
        works: list[Work] = [self._embed, *(partial(self._run, group) for group in groups)]
        if not is_staged:
            works = [self._everything]
        self._reserve()
        self.upload((), {})
        self._pieces = capture(works, pool, have_run=has_run)
        # What the head takes is all that is read after the layers: other graphs may have the rest.
        del self._step, self._hidden
        self._num_layer_pieces = len(groups)

    def capture_sampling(self, needs: Needs) -> None:
        """Capture one more way of sampling; between iterations.

        Raises:
            torch.OutOfMemoryError: see `capture`.
        """
        self.upload((), {})  # it is run once, and must feed no lane a token
        tokens: list[Tensor] = []
        (piece,) = capture([partial(self._choose, needs, tokens)], self._pool)
        self._samplings[needs] = _Sampling(piece, tokens[-1])

    def samples(self, needs: Needs) -> bool:
        """Whether this way of sampling is captured."""
        return needs in self._samplings

    def _reserve(self) -> None:
        """Say where the numbers will lie."""
        self.fed = self._model.fed_tokens(self._bucket, most_updates(self._bucket))

    def upload(self, rows: Sequence[Row], updates: Updates) -> None:
        """Bring an iteration's numbers to the device.

        Args:
            rows: those of one token first.
        """
        model = self._model
        model.upload(self.fed, rows, model.make_room(updates, self.fed.num_updates))

    @property
    def graph_bytes(self) -> int:
        pieces = [*self._pieces, *(sampling.piece for sampling in self._samplings.values())]
        return sum(piece.graph_bytes for piece in pieces)

    def begin(self) -> None:
        """The numbers are uploaded: go up to the first staged layer, or through all of them."""
        self._pieces[0].replay()

    def run_layers(self, layers: range) -> None:
        """A layer group; nothing, if all layers are one piece."""
        if self._num_layer_pieces:
            self._pieces[1 + self._model.layout.group_of(layers.start)].replay()

    def sample(self, rows: Sequence[Row], needs: Needs) -> Sampled:
        """The tokens of those rows that are sampled; captured ones are overwritten by the next
        iteration.

        Args:
            rows: that were uploaded; some of them are sampled.
            needs: of these.
        """
        some = self._sampled_rows(rows)
        if captured := self._samplings.get(needs):
            captured.piece.replay()
            return Sampled(some(captured.tokens), None)
        # Padding and rows that only feed a token are left out: tokens sampled here are counted.
        lanes, positions = map(some, self._lanes_and_positions())
        return self._model.choose(some(self._head_input), lanes, positions, needs)

    def _sampled_rows(self, rows: Sequence[Row]) -> Callable[[Tensor], Tensor]:
        """Takes these rows' part of a tensor over the rows that can be sampled."""
        which = [i for i, row in enumerate(rows) if row.is_sampled]
        if len(which) == len(rows):
            return lambda tensor: tensor[: len(which)]
        index = upload(which, self._model.device)
        return lambda tensor: tensor.index_select(0, index)

    def _lanes_and_positions(self) -> tuple[Tensor, Tensor]:
        """Of the rows that can be sampled: [m] lanes, [m] positions of the tokens to sample."""
        return self.fed.lanes, self.fed.positions + 1

    def _last_hidden(self) -> Hidden:
        """The hidden state of the rows that can be sampled."""
        return self._hidden

    def _everything(self) -> None:
        self._embed()
        self._run(range(self._model.layout.num_layers))

    def _embed(self) -> None:
        self._step, self._hidden = self._model.embed(
            self.fed, decode_tokens=self._bucket, tiles=None
        )

    def _run(self, layers: range) -> None:
        self._model.run_layers(layers, self._hidden, self._step)
        if layers.stop == self._model.layout.num_layers:
            self._head_input = self._model.head_input(self._last_hidden())

    def _choose(self, needs: Needs, tokens: list[Tensor]) -> None:
        chosen = self._model.choose(self._head_input, *self._lanes_and_positions(), needs)
        tokens.append(chosen.tokens)


def most_updates(bucket: int) -> int:
    """Block-table updates that a graph takes in; every row may begin a block."""
    return max(16, bucket)
