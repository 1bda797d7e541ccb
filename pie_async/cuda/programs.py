"""The captured iterations of one runner: which there are, and which are still wanted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch

from pie_async.core.batch_shapes import batch_shape, batch_shapes
from pie_async.cuda.decode_program import DecodeProgram
from pie_async.cuda.fused_model import DRAWN, GREEDY, FusedModel, takes_one_kernel
from pie_async.cuda.mixed_program import MixedProgram
from pie_async.messages import Row
from pie_async.model.sampling import Needs

_log = logging.getLogger(__name__)

Key = tuple[int, int, bool]
"""Bucket, tokens of prompts, whether it is staged."""
Part = tuple[Key, Needs | None]
"""What is captured at a time: the layers of a program, or a way of sampling after them."""


class Programs:
    """Captured at the start or when first wanted, but never while an iteration is being launched.

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
        self._captured: dict[Key, DecodeProgram] = {}
        self._refused: set[Part] = set()
        """There was no memory for them."""
        self._wanted: list[Part] = []

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
        key = *shape, is_staged
        program = self._captured.get(key)
        if program is None:
            self._want((key, None))
        elif takes_one_kernel(needs) and not program.samples(needs):
            self._want((key, needs))
        return program

    def _want(self, part: Part) -> None:
        if part not in self._refused and part not in self._wanted:
            self._wanted.append(part)

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
            self._capture(self._wanted.pop(), has_room)

    def capture_all(self) -> None:
        """What iterations may need, largest first: the smaller ones then fit into its memory.

        Staged ones too: they are first wanted under pressure, where capturing one, 50 to 100 ms
        with 64 layers, holds up everybody. Not sampling under masks, which takes 1 or 2.
        """
        if not self._largest:
            return
        shapes = batch_shapes(self._largest, self._max_tokens)
        for shape, is_staged in product(shapes, (False, True) if self._streams else (False,)):
            for needs in (None, DRAWN, GREEDY):
                self._capture(((*shape, is_staged), needs))

    @property
    def graph_bytes(self) -> int:
        """What they take."""
        return sum(program.graph_bytes for program in self._captured.values())

    def close(self) -> None:
        """Free them, and let go of the model."""
        self._captured.clear()
        self._wanted.clear()
        del self._model

    def _capture(self, part: Part, has_room: Callable[[], bool] = lambda: True) -> None:
        if not has_room():
            self._refuse(part)
            return
        try:
            try:
                self._make(*part)
            except torch.OutOfMemoryError:
                # While capturing, torch gives back nothing of what it keeps for later.
                torch.cuda.empty_cache()
                self._make(*part)
        except torch.OutOfMemoryError:
            self._refuse(part)

    def _make(self, key: Key, needs: Needs | None) -> None:
        if needs is not None:
            if program := self._captured.get(key):
                program.capture_sampling(needs)
            return
        bucket, prompt_tokens, is_staged = key
        twin = self._captured.get((bucket, prompt_tokens, not is_staged))
        how = {"is_staged": is_staged, "has_run": twin is not None, "pool": self._pool}
        self._captured[key] = (
            MixedProgram(self._model, bucket, prompt_tokens, **how)
            if prompt_tokens
            else DecodeProgram(self._model, bucket, **how)
        )

    def _refuse(self, part: Part) -> None:
        self._refused.add(part)
        (bucket, prompt_tokens, _), needs = part
        _log.warning(
            "no memory for a CUDA graph of %d rows and %d tokens of prompts: their %s run without "
            "one, slower; lower token_budget or device_kv_bytes, or raise gpu_memory",
            bucket,
            prompt_tokens,
            "layers" if needs is None else "sampling kernels",
        )
