"""A decode iteration as captured pieces, and which of it a graph can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pie_async.cuda.fused_decoder import Hidden
from pie_async.cuda.fused_model import DRAWN, GREEDY, FusedModel
from pie_async.cuda.graphs import Work, capture
from pie_async.cuda.step_attention import StepAttention
from pie_async.cuda.step_inputs import FedTokens, Updates
from pie_async.messages import Row
from pie_async.model.sampling import Needs, Sampled
from pie_async.model.transfer import upload

if TYPE_CHECKING:
    from torch import Tensor


class DecodeProgram:
    """An iteration of one-token rows, padded to a bucket.

    Attributes:
        fed: where its numbers are uploaded to.
    """

    def __init__(
        self,
        model: FusedModel,
        bucket: int,
        needs: Needs | None,
        *,
        is_staged: bool,
        has_run: bool,
        pool: Any,
    ) -> None:
        """Run it once over padding, then capture it.

        Args:
            needs: what is sampled within the graph; None: sampling stays outside.
            is_staged: a piece per layer group instead of one for everything.
            has_run: its kernels ran with these shapes: they were captured in other pieces.
            pool: the graphs' memory.

        Raises:
            torch.OutOfMemoryError: see `capture`.
        """
        self._model = model
        self._bucket = bucket
        self._needs = needs
        self.fed: FedTokens
        self._step: StepAttention
        self._hidden: Hidden
        self._chosen: Sampled
        layout = model.layout
        groups = [layout.group(g) for g in range(layout.num_groups)] if is_staged else []
        works: list[Work] = [self._embed, *(partial(self._run, group) for group in groups)]
        if needs is not None:
            works.append(self._choose)
        if not is_staged:
            works = [self._everything]
        self._reserve()
        self.upload((), {})
        self._pieces = capture(works, pool, have_run=has_run)
        self._num_layer_pieces = len(groups)

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
        return sum(piece.graph_bytes for piece in self._pieces)

    def begin(self) -> None:
        """The numbers are uploaded: go up to the first staged layer."""
        if self._num_layer_pieces:
            self._pieces[0].replay()

    def run_layers(self, layers: range) -> None:
        """A layer group; nothing, if everything is one piece."""
        if self._num_layer_pieces:
            self._pieces[1 + self._model.layout.group_of(layers.start)].replay()

    def finish(self) -> None:
        """The rest; sampling, if that is captured."""
        if self._needs is not None or not self._num_layer_pieces:
            self._pieces[-1].replay()

    def sampled(self, rows: Sequence[Row], needs: Needs) -> Sampled:
        """The tokens of those rows that are sampled; captured ones are overwritten by the next
        iteration.

        Args:
            rows: that were uploaded; some of them are sampled.
            needs: of these. Padding and rows that only feed a token are left out, for tokens
                sampled out here are counted.
        """
        some = self._sampled_rows(rows)
        if self._needs is not None:
            return Sampled(some(self._chosen.tokens), None)
        lanes, positions = some(self.fed.lanes), some(self.fed.positions) + 1
        return self._model.choose(self._hidden.rows(some), lanes, positions, needs)

    def _sampled_rows(self, rows: Sequence[Row]) -> Callable[[Tensor], Tensor]:
        """Takes these rows out of a tensor over the bucket."""
        which = [i for i, row in enumerate(rows) if row.is_sampled]
        if len(which) == len(rows):
            return lambda tensor: tensor[: len(which)]
        index = upload(which, self._model.device)
        return lambda tensor: tensor.index_select(0, index)

    def _everything(self) -> None:
        self._embed()
        self._run(range(self._model.layout.num_layers))
        if self._needs is not None:
            self._choose()

    def _embed(self) -> None:
        self._step, self._hidden = self._model.embed(
            self.fed, decode_tokens=self._bucket, tiles=None
        )

    def _run(self, layers: range) -> None:
        self._model.run_layers(layers, self._hidden, self._step)

    def _choose(self) -> None:
        assert self._needs is not None
        fed = self.fed
        self._chosen = self._model.choose(self._hidden, fed.lanes, fed.positions + 1, self._needs)


def graphable(needs: Needs) -> Needs | None:
    """What a graph samples: argmax, with noise or without. None: not this.

    Everything else would make a graph for each combination that somebody thinks of, each with
    work space of its own, and takes less time to launch than the layers before it to run.
    """
    return needs if needs in (GREEDY, DRAWN) else None


def most_updates(bucket: int) -> int:
    """Block-table updates that a graph takes in; every row may begin a block."""
    return max(16, bucket)
