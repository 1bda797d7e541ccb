"""A kernel's time in a replayed CUDA graph, as an engine runs it; and the table of such times."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

Work = Callable[[], Tensor | tuple[Tensor, ...] | None]

_CACHED_BYTES = 400 * 10**6
"""Several times the L2 cache of the large cards."""
_MOST_COPIES = 20
_LEAST_CALLS = 4
"""In a graph, so that what a replay itself takes is shared."""
_TOLERANCE = 1e-2
"""Relative; bfloat16 rounds to 0.004."""


class Case(NamedTuple):
    """One kernel, one shape, one configuration."""

    kernel: str
    shape: str
    config: str
    works: Sequence[Work]
    """The same work on buffers of its own each; see `num_copies`."""
    error: Callable[[], float]
    """Runs the first of them and compares it with the reference; see `difference`."""
    num_bytes: int = 0
    flops: int = 0
    note: str = ""


class Row(NamedTuple):
    """What became of a case."""

    kernel: str
    shape: str
    config: str
    us: float | None
    tb_per_s: float | None
    tflop_per_s: float | None
    note: str
    is_wrong: bool = False


def num_copies(num_bytes: int) -> int:
    """Buffers of so many bytes to take in turn, so that none is still in the cache."""
    return min(max(-(-_CACHED_BYTES // max(num_bytes, 1)), 1), _MOST_COPIES)


def difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference relative to what is expected; of integers, the share differing."""
    if not found.is_floating_point():
        return float((found != expected).float().mean())
    wide = expected.float()
    return float((found.float() - wide).norm() / wide.norm().clamp(min=1e-30))


def measure(case: Case, *, replays: int) -> Row:
    """The case's time if its result is right; a configuration that cannot run costs its row."""
    row = Row(case.kernel, case.shape, case.config, None, None, None, case.note)
    try:
        error = case.error()
        if not error <= _TOLERANCE:  # NaN is wrong too
            return row._replace(note=f"WRONG: off by {error:.1e}", is_wrong=True)
        us = replay_us(case.works, replays=replays)
    except Exception as failure:  # of any of the compilers and drivers below
        return row._replace(note=f"{type(failure).__name__}: {failure}")
    return row._replace(
        us=us,
        tb_per_s=case.num_bytes / us / 1e6 if case.num_bytes else None,
        tflop_per_s=case.flops / us / 1e6 if case.flops else None,
    )


def replay_us(works: Sequence[Work], *, replays: int) -> float:
    """Median microseconds of one call within a replayed CUDA graph that begins with a cold L2."""
    others = torch.zeros(_CACHED_BYTES // 4, device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for work in works:
            work()  # what is compiled or loaded now must not be captured
        stream.synchronize()
        rounds = -(-_LEAST_CALLS // len(works))
        graph.capture_begin()
        try:
            # Kept, or all calls would write to the same place.
            kept = [work() for _ in range(rounds) for work in works]
        finally:
            graph.capture_end()
        graph.replay()
        times = [_milliseconds(graph, others) for _ in range(replays)]
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times) / len(kept) * 1e3


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One for good: torch keeps a workspace for every stream that ever saw a product."""
    return torch.cuda.Stream()


def _milliseconds(graph: torch.cuda.CUDAGraph, others: Tensor) -> float:
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    others.sum()  # read, not written: nothing is left to write back while the graph runs
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def show(rows: Sequence[Row], title: str) -> None:
    """One table for people."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1), pad_edge=False)
    for name in ("kernel", "shape", "configuration"):
        table.add_column(name, no_wrap=True)
    for name in ("us", "TB/s", "TFLOP/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        table.add_row(
            row.kernel,
            row.shape,
            row.config,
            _number(row.us, 1),
            _number(row.tb_per_s, 2),
            _number(row.tflop_per_s, 0),
            row.note[:60],
        )
    Console(width=150).print(table)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def write(path: Path, rows: Sequence[Row], **facts: str) -> None:
    """Everything that was measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": [row._asdict() for row in rows]}, indent=1))
