"""What copies to the GPU cost the kernels that run beside them, without an engine.

    python -m scripts.paper.copy_cost

Transparency takes a copy to cost its writes: so many bytes at the memory's rate. Here two kernels
that wait for memory alone, a sum over much of it and a product with 64 rows, are timed alone and
beside copies that never stop, in turn. What they lose, by byte copied, over what a byte of their
own reading takes, is the cost: 1 is what arithmetic says. Copies come from pinned host memory and,
with two GPUs, from the other one; in pieces and into rings of several sizes, by a copy engine and
by a kernel on a few multiprocessors.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec
import numpy as np
import torch

from pie_async.config import KIB, MIB
from pie_async.cuda.errors import require_cuda
from pie_async.errors import ConfigError
from pie_async.model.transfer import seen_by_gpu
from scripts.paper.progress import Progress
from scripts.paper.results import RESULTS, Results

if TYPE_CHECKING:
    from pie_async.cuda.driver import Copies, Driver

SOURCE_BYTES = 1024 * MIB
WINDOW_S = 0.05
LINK_BYTES_PER_S = {"host": 56e9, "peer": 400e9}
"""Expected; copies for twice as long as the kernels take are issued."""
WARM_UP = 20
"""Runs before anything is timed."""
COPYING_SMS = 8
"""Multiprocessors whose kernel copies."""

Source = Literal["host", "peer"]


class Way(NamedTuple):
    """How bytes come."""

    source: Source
    piece_bytes: int
    """0: by a kernel."""
    ring_bytes: int
    """Written again and again; what the L2 cache holds need not reach memory every time."""


WAYS = (
    Way("host", 64 * MIB, 128 * MIB),
    Way("host", 4 * MIB, 128 * MIB),
    Way("host", 512 * KIB, 128 * MIB),
    Way("host", 8 * MIB, 8 * MIB),
    Way("host", 64 * MIB, 1024 * MIB),
    Way("host", 0, 128 * MIB),
    Way("peer", 64 * MIB, 128 * MIB),
    Way("peer", 4 * MIB, 128 * MIB),
)
"""Not from a peer into a small ring: its thousands of single copies fill the stream's queue, and
most are over before the kernels can begin."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel beside one way of copying."""

    kernel: str
    source: str
    piece_bytes: int
    """0: by a kernel."""
    ring_bytes: int
    alone_s: float
    """Median of the windows without copies."""
    ratio: float
    """Beside copies / alone, median of neighbouring windows."""
    read_bytes_per_s: float
    """By the kernel alone."""
    copied_bytes_per_s: float
    expected_ratio: float
    """If a byte that is copied took as long as one that is read."""
    cost: float
    """What is lost, over what is expected to be."""


class Kernel(NamedTuple):
    """Something that waits for memory."""

    name: str
    run: Callable[[], object]
    read_bytes: int


def main() -> None:
    """Measure every kernel beside every way there is."""
    given = _parser().parse_args()
    try:
        require_cuda()
    except ConfigError as error:
        raise SystemExit(f"copy_cost: {error}") from error
    from pie_async.cuda.driver import Driver

    results = Results("copy_cost", given.results, {"windows": given.windows})
    driver = Driver(torch.device("cuda"))
    stream = driver.create_stream()
    with torch.inference_mode():
        kernels = [_sum(driver.device), _product(driver.device)]
        progress = Progress(len(WAYS) * len(kernels))
        for source, ways in itertools.groupby(WAYS, key=lambda way: way.source):
            if source == "peer" and torch.cuda.device_count() < 2:
                print("no second GPU: nothing is copied from a peer")
                continue
            memory = _source(driver, source)
            for way, kernel in itertools.product(list(ways), kernels):
                progress.begin(f"{kernel.name} beside copies from the {source}")
                results.add(_measure(driver, stream, memory, way, kernel, given.windows))
    driver.synchronize_device()


def _sum(device: torch.device) -> Kernel:
    much = torch.ones(1536 * MIB, dtype=torch.float32, device=device)
    return Kernel("sum", much.sum, much.nbytes)


def _product(device: torch.device) -> Kernel:
    weights = torch.zeros((131072, 8192), dtype=torch.bfloat16, device=device)
    rows = torch.zeros((64, 8192), dtype=torch.bfloat16, device=device)
    return Kernel("product", lambda: rows @ weights.T, weights.nbytes)


def _source(driver: Driver, source: Source) -> torch.Tensor:
    """Memory to copy from, as the GPU sees it."""
    if source == "host":
        return torch.zeros(SOURCE_BYTES // 4, dtype=torch.int32, pin_memory=True)
    there = torch.zeros(SOURCE_BYTES // 4, dtype=torch.int32, device="cuda:1")
    there.to(driver.device)  # so that torch lets each reach the other's memory
    return there


def _measure(
    driver: Driver, stream: int, source: torch.Tensor, way: Way, kernel: Kernel, windows: int
) -> Point:
    ring = torch.empty(way.ring_bytes // 4, dtype=torch.int32, device=driver.device)
    _window(driver, kernel, WARM_UP)
    repeats = max(1, round(WINDOW_S * WARM_UP / _window(driver, kernel, WARM_UP)))
    copied_bytes = round(2 * WINDOW_S * LINK_BYTES_PER_S[way.source])
    alone_s, ratios, rates = [_window(driver, kernel, repeats)], [], []
    for _ in range(windows):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with driver.torch_on(stream):
            began.record()
        issued_bytes = _issue(driver, stream, source, ring, way, copied_bytes)
        with driver.torch_on(stream):
            ended.record()
        time.sleep(1e-3)  # the link is busy now
        beside_s = _window(driver, kernel, repeats, until=ended)
        rates.append(issued_bytes / _between_s(began, ended))
        alone_s.append(_window(driver, kernel, repeats))
        ratios.append(2 * beside_s / (alone_s[-2] + alone_s[-1]))
    alone, ratio, rate = map(statistics.median, (alone_s, ratios, rates))
    read_rate = repeats * kernel.read_bytes / alone
    return Point(
        kernel=kernel.name,
        source=way.source,
        piece_bytes=way.piece_bytes,
        ring_bytes=way.ring_bytes,
        alone_s=alone,
        ratio=ratio,
        read_bytes_per_s=read_rate,
        copied_bytes_per_s=rate,
        expected_ratio=1 / (1 - rate / read_rate),
        cost=(1 - 1 / ratio) / (rate / read_rate),
    )


def _between_s(began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
    return float(began.elapsed_time(ended)) / 1e3


def _window(
    driver: Driver, kernel: Kernel, repeats: int, *, until: torch.cuda.Event | None = None
) -> float:
    """Seconds of so many runs.

    Args:
        until: copies that must still run when the kernels are done.

    Raises:
        RuntimeError: they were done before.
    """
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(repeats):
        kernel.run()
    ended.record()
    driver.synchronize_device()
    if until is not None and ended.elapsed_time(until) < 0:
        raise RuntimeError("the copies ended before the kernels: raise LINK_BYTES_PER_S")
    return _between_s(began, ended)


def _issue(
    driver: Driver, stream: int, source: torch.Tensor, ring: torch.Tensor, way: Way, num_bytes: int
) -> int:
    """Returns: bytes that are on their way."""
    if not way.piece_bytes:
        return _copy_by_kernel(driver, stream, source, ring, num_bytes)
    issued_bytes = 0
    for copies in _batches(source, ring, way):
        driver.copy(copies, stream)
        issued_bytes += int(copies[2].sum())
        if issued_bytes >= num_bytes:
            break
    return issued_bytes


def _batches(source: torch.Tensor, ring: torch.Tensor, way: Way) -> Iterator[Copies]:
    """Once through the ring at a time, without end."""
    pieces = np.arange(way.ring_bytes // way.piece_bytes, dtype=np.uint64)
    offsets = pieces * np.uint64(way.piece_bytes)
    sizes = np.full_like(offsets, way.piece_bytes)
    for turn in itertools.count():
        begin = turn * way.ring_bytes % SOURCE_BYTES
        yield np.stack(
            (
                offsets + np.uint64(source.data_ptr() + begin),
                offsets + np.uint64(ring.data_ptr()),
                sizes,
            )
        )


def _copy_by_kernel(
    driver: Driver, stream: int, source: torch.Tensor, ring: torch.Tensor, num_bytes: int
) -> int:
    from scripts.paper._copy_kernel import copy_through

    seen = seen_by_gpu(source, driver.device)
    with driver.torch_on(stream):
        rounds = -(-num_bytes // ring.nbytes)
        for turn in range(rounds):
            begin = turn * ring.numel() % seen.numel()
            copy_through(seen[begin : begin + ring.numel()], ring, COPYING_SMS)
    return rounds * ring.nbytes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=15, help="beside copies, for each row")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()
