"""The captured iterations of one runner: which there are, and which are still wanted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from pie_async.core.batch_shapes import batch_shape, batch_shapes
from pie_async.cuda.decode_program import DecodeProgram, graphable
from pie_async.cuda.fused_model import GREEDY, FusedModel
from pie_async.cuda.mixed_program import MixedProgram
from pie_async.messages import Row
from pie_async.model.sampling import Needs

_log = logging.getLogger(__name__)

Key = tuple[int, int, Needs | None, bool]
"""Bucket, tokens of prompts, what is sampled within the graph, whether it is staged."""


class Programs:
    """Captured when first wanted, but never while an iteration is being launched.

    Args:
        largest: most rows of one token in a graph; 0: nothing is captured.
        max_tokens: most tokens of an iteration.
        streams: iterations may be staged.
        pool: the graphs' memory.
    """

    def __init__(
        self, model: FusedModel, *, largest: int, max_tokens: int, streams: bool, pool: Any
    ) -> None:
        self._model = model
        self._largest = largest
        self._max_tokens = max_tokens
        self._streams = streams
        self._pool = pool
        self._captured: dict[Key, DecodeProgram | None] = {}
        """None: there was no memory for it."""
        self._wanted: list[Key] = []

    def find(self, rows: Sequence[Row], needs: Needs, *, is_staged: bool) -> DecodeProgram | None:
        """The program for these rows; None: they run without one, this time at least.

        Args:
            rows: those of one token first.
            needs: of those that are sampled.
        """
        if not rows or any(map(self._model.lanes.wants_scores, rows)):
            return None
        shape = batch_shape(rows, largest=self._largest, max_tokens=self._max_tokens)
        if shape is None:
            return None
        key = *shape, graphable(needs), is_staged
        if key not in self._captured and key not in self._wanted:
            self._wanted.append(key)
        return self._captured.get(key)

    @property
    def are_wanted(self) -> bool:
        """Whether something was looked for that is not captured yet."""
        return bool(self._wanted)

    def capture_wanted(self, has_room: Callable[[], bool]) -> None:
        """Between iterations: it takes as long as many of them, which would count as time that
        one of them computed.

        Args:
            has_room: whether there is memory for one more.
        """
        while self._wanted:
            key = self._wanted.pop()
            if has_room():
                self._capture(key)
            else:
                self._do_without(key)

    def capture_greedy(self) -> None:
        """What most iterations need, largest first: the smaller ones then fit into its memory.

        Staged ones too: they are first wanted under pressure, where capturing one, 50 to 100 ms
        with 64 layers, holds up everybody.
        """
        if not self._largest:
            return
        for shape in batch_shapes(self._largest, self._max_tokens):
            for is_staged in (False, True) if self._streams else (False,):
                self._capture((*shape, GREEDY, is_staged))

    @property
    def graph_bytes(self) -> int:
        """What they take."""
        return sum(program.graph_bytes for program in self._captured.values() if program)

    def close(self) -> None:
        """Free them, and let go of the model."""
        self._captured.clear()
        self._wanted.clear()
        del self._model

    def _capture(self, key: Key) -> None:
        bucket, prompt_tokens, needs, is_staged = key
        twin = self._captured.get((bucket, prompt_tokens, needs, not is_staged))
        how = {"is_staged": is_staged, "has_run": twin is not None, "pool": self._pool}
        make: Callable[[], DecodeProgram]
        if prompt_tokens:
            make = partial(MixedProgram, self._model, bucket, prompt_tokens, needs, **how)
        else:
            make = partial(DecodeProgram, self._model, bucket, needs, **how)
        try:
            try:
                self._captured[key] = make()
            except torch.OutOfMemoryError:
                # While capturing, torch gives back nothing of what it keeps for later.
                torch.cuda.empty_cache()
                self._captured[key] = make()
        except torch.OutOfMemoryError:
            self._do_without(key)

    def _do_without(self, key: Key) -> None:
        self._captured[key] = None
        _log.warning(
            "no memory for a CUDA graph of %d rows and %d tokens of prompts: they run without "
            "one, slower; lower token_budget or device_kv_bytes, or raise gpu_memory",
            key[0],
            key[1],
        )
