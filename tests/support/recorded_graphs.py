"""Stands in for CUDA graphs: what a piece does is recorded, and replayed into the same tensors.

A replay runs no Python of the runner's own: what the host decided while recording is decided for
good, and tensors that are made anew between two replays are not read. Fresh memory is filled with
what nobody should read, so what another iteration left behind is not read either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from pie_async.cuda import decode_program, programs

if TYPE_CHECKING:
    import pytest

GARBAGE = -12345
_FRESH = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided"}
_NEVER = {"aten::_local_scalar_dense", "aten::nonzero"}
"""Would wait for the GPU."""


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Callable[[], None]]) -> None:
        super().__init__()
        self._calls = calls
        self.is_launching = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.is_launching:
            name = func._schema.name
            assert name not in _NEVER, f"{name} cannot be captured"
            self._calls.append(lambda: _repeat(func, args, kwargs, result))
            if name in _FRESH:
                _spoil(result)
        return result


def _repeat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    if func._schema.name in _FRESH:
        _spoil(result)
        return
    again = func(*args, **kwargs)
    for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


def _spoil(tensor: torch.Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else GARBAGE)


class RecordedPiece:
    """As `graphs.Piece`."""

    graph_bytes = 1

    def __init__(self, work: Callable[[], None]) -> None:
        self._calls: list[Callable[[], None]] = []
        with _recording(self._calls):
            work()

    def replay(self) -> None:
        for call in self._calls:
            call()


@contextmanager
def _recording(calls: list[Callable[[], None]]) -> Iterator[None]:
    launch = GridExecutor.__call__
    recorder = _Recorder(calls)

    def record(executor, *args, **kwargs) -> None:
        recorder.is_launching = True
        try:
            launch(executor, *args, **kwargs)
        finally:
            recorder.is_launching = False
        calls.append(lambda: launch(executor, *args, **kwargs))

    GridExecutor.__call__ = record
    try:
        with recorder:
            yield
    finally:
        GridExecutor.__call__ = launch


def _capture(
    pieces: Iterable[Callable[[], None]], pool: Any, *, have_run: bool = False
) -> list[RecordedPiece]:
    pieces = list(pieces)
    for work in () if have_run else pieces:
        work()
    return [RecordedPiece(work) for work in pieces]


def record_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runners use these graphs for the length of a test."""
    monkeypatch.setattr(decode_program, "capture", _capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(programs.torch.cuda, "empty_cache", lambda: None)
