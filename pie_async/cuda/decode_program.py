"""A decode iteration as captured pieces, and which of it a graph can hold."""

from __future__ import annotations

from functools import partial
from typing import Any

from pie_async.cuda.fused_decoder import Hidden
from pie_async.cuda.fused_model import FusedModel
from pie_async.cuda.graphs import Work, capture
from pie_async.cuda.step_attention import StepAttention
from pie_async.model.sampling import Needs, Sampled


class DecodeProgram:
    """An iteration of one-token rows, padded to a bucket.

    Attributes:
        fed: where its numbers are to be uploaded.
    """

    def __init__(
        self,
        model: FusedModel,
        bucket: int,
        needs: Needs | None,
        *,
        is_staged: bool,
        pool: Any,
    ) -> None:
        """Run it once over padding, then capture it.

        Args:
            needs: what is sampled within the graph; None: sampling stays outside.
            is_staged: a piece per layer group instead of one for everything.
            pool: the graphs' memory.
        """
        self._model = model
        self._bucket = bucket
        self._needs = needs
        self.fed = model.fed_tokens(bucket, most_updates(bucket))
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
        model.upload(self.fed, (), {})
        self._pieces = capture(works, pool)
        self._num_layer_pieces = len(groups)

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
            self._pieces[1 + layers.start // self._model.layout.layer_group].replay()

    def sample(self, needs: Needs) -> Sampled:
        """The tokens of all rows, padding included; overwritten by the next iteration."""
        if self._needs is not None or not self._num_layer_pieces:
            self._pieces[-1].replay()
        if self._needs is not None:
            return self._chosen
        fed = self.fed
        return self._model.choose(self._hidden.shared(), fed.lanes, fed.positions + 1, needs)

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
    """What a graph can sample: only what reads the lanes' fixed numbers. None: not this."""
    if needs.biases or needs.min_tokens or needs.penalties or needs.top_logprobs >= 0:
        return None
    # Depths that differ little share a graph; a deeper one gives the same result.
    return needs._replace(top_k=1 << (needs.top_k - 1).bit_length() if needs.top_k else 0)


def most_updates(bucket: int) -> int:
    """Block-table updates that a graph takes in; every row may begin a block."""
    return max(16, bucket)
