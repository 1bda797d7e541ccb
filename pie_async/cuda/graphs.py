"""CUDA graphs: captured pieces of an iteration, replayed with one launch each.

An iteration with nothing streamed is one piece. One that streams is several, because a wait
for copies that themselves wait for this iteration's layers cannot be captured with them: the
beginning, a piece per layer group, and the end.

All pieces share one pool of memory. What a later piece of the same iteration reads is kept by
whoever captured it; everything else may be overwritten by whatever is replayed next, so an
iteration's pieces are replayed one after the other, with no other iteration's in between.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

Work = Callable[[], None]

_capturing = threading.Lock()
"""Two engines of a process take turns: they share the garbage collector."""


class Piece:
    """Work that was captured.

    Attributes:
        graph_bytes: what was free on the card before and is not now; others are taken to stand
            still.
    """

    def __init__(self, work: Work, pool: Any) -> None:
        """Capture on the current stream.

        Nothing of it runs now. Every kernel in it has run before: compiling one while capturing
        is not allowed.

        Args:
            pool: memory shared with the pieces that are replayed on the same stream.
        """
        free_bytes = torch.cuda.mem_get_info()[0]
        self._graph = torch.cuda.CUDAGraph()
        # Other threads wait for events meanwhile; only this one's calls must be capturable.
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with suppress(RuntimeError):  # the first error tells more
                self._graph.capture_end()
            raise
        self._graph.capture_end()
        self.graph_bytes = max(0, free_bytes - torch.cuda.mem_get_info()[0])

    def replay(self) -> None:
        self._graph.replay()


def capture(pieces: Iterable[Work], pool: Any, *, have_run: bool = False) -> list[Piece]:
    """Run all of them once, to compile and warm up, then capture one after the other.

    Args:
        have_run: they have been run before with these shapes; half the time is saved.

    Meanwhile no other thread may record an event on the current stream, as torch does where
    pinned memory is freed that its own copies there have used: it would count as captured, and
    asking for it fails (pytorch/pytorch#193982). `model/transfer.py` leaves nothing to torch.

    Raises:
        torch.OutOfMemoryError: torch gives back nothing that it keeps while capturing.
    """
    pieces = list(pieces)
    if not have_run:
        for work in pieces:
            work()
    with _capturing, _no_collection():
        return [Piece(work, pool) for work in pieces]


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
