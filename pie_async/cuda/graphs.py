"""CUDA graphs: captured pieces of an iteration, replayed with one launch each.

An iteration with nothing streamed is one piece. One that streams is several, because a wait
for copies that themselves wait for this iteration's layers cannot be captured with them: the
beginning, a piece per layer group, and the end.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

Work = Callable[[], None]


class Piece:
    """Work that was captured.

    Attributes:
        graph_bytes: memory that the graphs' pool grew by.
    """

    def __init__(self, work: Work, pool: Any) -> None:
        """Capture on the current stream.

        Nothing of it runs now. Every kernel in it has run before: compiling one while capturing
        is not allowed.

        Args:
            pool: memory shared with the pieces that are replayed on the same stream.
        """
        before = torch.cuda.memory_reserved()
        self._graph = torch.cuda.CUDAGraph()
        with _no_collection():
            # Other threads wait for events meanwhile; only this one's calls must be capturable.
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # the first error tells more
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        self.graph_bytes = torch.cuda.memory_reserved() - before

    def replay(self) -> None:
        self._graph.replay()


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collection might free another engine's graph, which is not allowed while capturing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def capture(pieces: Iterable[Work], pool: Any) -> list[Piece]:
    """Run all of them once, to compile and warm up, then capture one after the other."""
    pieces = list(pieces)
    for work in pieces:
        work()
    return [Piece(work, pool) for work in pieces]


def bucket_of(num_rows: int, largest: int) -> int | None:
    """The padded batch size that `num_rows` rows are run with; None: too many for a graph.

    1, 2, 4, then multiples of 8 to 64, of 16 to 256, of 32 beyond: at most an eighth is padding
    where an iteration costs more than reading the weights.
    """
    if num_rows > largest:
        return None
    for size in (1, 2, 4):
        if num_rows <= size:
            return min(size, largest)
    step = 8 if num_rows <= 64 else 16 if num_rows <= 256 else 32
    return min(-(-num_rows // step) * step, largest)


def buckets(largest: int) -> list[int]:
    """All sizes that `bucket_of` gives, rising."""
    return sorted({bucket_of(rows, largest) or largest for rows in range(1, largest + 1)})
