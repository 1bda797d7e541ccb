"""GPU memory at equal performance: how little KV memory does with a pool (Pie, section 6.1).

    python -m scripts.paper.equal_memory --device sim --model qwen2.5-32b --kv 4GiB 7GiB 12GiB 20GiB

An engine without a pool answers requests that are all there at once, with so much KV memory. Then
the least KV memory is searched with which Pie's throughput is within --within of that: every run
halves the range, or cuts it where the two ends' throughputs say. Runs are shared by all searches
of a link. The memory in all is weights, KV and the staging ring; the ring is taken to hold half
as much again as was streamed on the average.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from pie_async.assembly.sizing import model_layout
from pie_async.config import format_size, parse_size
from pie_async.device.cost_model import ModelShape, gpu_named, link_named, shape_named
from scripts.paper.load import Row, measure
from scripts.paper.options import MODES, add_context, engine_config, loop_of, parser_of, requests_of
from scripts.paper.progress import Progress
from scripts.paper.results import Results, replot

FIRST_GUESS = 1.67
"""The paper's factor: where the search begins."""
FARTHEST = 64
"""Less than this part of the unpooled engine's KV memory is not tried."""
RING_SLOTS = 1.5
"""Of the staging ring, per block that was streamed on the average."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One amount of unpooled KV memory, and what does the same with a pool."""

    model: str
    link: str
    off_kv_bytes: int
    off_tokens_per_s: float
    pie_kv_bytes: int
    pie_tokens_per_s: float
    factor: float
    """Unpooled KV memory over Pie's; below 1 is not searched: 1 means that nothing was saved."""
    bound_factor: float | None
    """The most that the link allows a decode iteration; None: KV memory is needed for what is
    being written alone."""
    weight_bytes: int
    ring_bytes: int
    off_total_bytes: int
    pie_total_bytes: int
    total_factor: float
    mean_streamed_blocks: float
    link_busy_share: float
    stall_share: float
    runs: int
    """Of Pie that were made for this row; others had been made before."""


def main() -> None:
    """Search for every link and size, or draw what was found."""
    given = _parser().parse_args()
    if given.plot_only:
        replot(given.name, given.results, Point, draw)
        return
    named = ("gpu", "within", "precision", "requests", "workload", "seed", "set")
    results = Results(
        given.name, given.results, {name: getattr(given, name) for name in named}, draw
    )
    with loop_of(given) as runner:
        _search(given, results.add, runner.run)
    results.finish()


def _search(
    given: argparse.Namespace,
    add: Callable[[Point], None],
    run: Callable[[Coroutine[Any, Any, Row]], Row],
) -> None:
    def measured(link: str | None, kv_bytes: int) -> Row:
        return run(_measure(given, link, kv_bytes))

    sizes = [parse_size(size, option="--kv") for size in given.kv]
    progress = Progress((1 + len(given.link)) * len(sizes))
    off: dict[int, Row] = {}
    for size in sizes:
        progress.begin(f"{format_size(size)} without a pool")
        off[size] = measured(None, size)
    for link in given.link:
        curve = _Curve(partial(measured, link))
        for size in sizes:
            progress.begin(f"{link}, what does as much as {format_size(size)}")
            before = len(curve.rows)
            wanted = (1 - given.within) * off[size].steady_tokens_per_s
            found = least_kv(curve, wanted, size, curve.known, precision=given.precision)
            curve(found)
            add(_point(given, link, off[size], curve.rows[found], len(curve.rows) - before))


class _Curve:
    """Pie's throughput over its KV memory, measured where it is asked for."""

    def __init__(self, measured: Callable[[int], Row]) -> None:
        self.rows: dict[int, Row] = {}
        self._measured = measured

    def __call__(self, kv_bytes: int) -> float:
        if kv_bytes not in self.rows:
            self.rows[kv_bytes] = self._measured(kv_bytes)
        return self.rows[kv_bytes].steady_tokens_per_s

    @property
    def known(self) -> dict[int, float]:
        return {size: row.steady_tokens_per_s for size, row in self.rows.items()}


def least_kv(
    tokens_per_s: Callable[[int], float],
    wanted: float,
    most: int,
    known: Mapping[int, float],
    *,
    precision: float,
) -> int:
    """The least KV memory that reaches a throughput, by narrowing a range.

    Args:
        tokens_per_s: measures the throughput with so many bytes; rises with them.
        most: bytes; returned if nothing less does.
        known: what was measured before.
        precision: the search ends when the range is narrower than this part of itself, or when
            the throughput is not more than a quarter of that above the wanted one.

    Returns:
        Bytes that were measured to reach it, or `most`.
    """
    enough = {size: seen for size, seen in known.items() if seen >= wanted and size < most}
    high = min(enough, default=most)
    high_seen = enough.get(high)
    short = {size: seen for size, seen in known.items() if seen < wanted and size < high}
    low = max(short, default=most // FARTHEST)
    low_seen = short.get(low)
    while high > low * (1 + precision) and not (
        high_seen and high_seen <= wanted * (1 + precision / 4)
    ):
        if low_seen and high_seen:
            share = math.log(wanted / low_seen) / math.log(high_seen / low_seen)
            margin = precision / 2 / math.log(high / low)  # so that every run narrows it
            share = min(max(share + margin, margin), 1 - margin)
        elif high == most and low_seen is None:
            share = 1 - math.log(FIRST_GUESS) / math.log(most / low)
        else:
            share = 0.5
        middle = round(low * (high / low) ** share)
        seen = tokens_per_s(middle)
        if seen >= wanted:
            high, high_seen = middle, seen
        else:
            low, low_seen = middle, seen
    return high


async def _measure(given: argparse.Namespace, link: str | None, kv_bytes: int) -> Row:
    """Pie with its pool behind `link`, or no pool."""
    fields: dict[str, Any] = {}
    if given.device == "sim":
        fields = {"sim_gpu": given.gpu, "sim_link": link or given.link[0]}
    mode = "off" if link is None else "pie"
    config = engine_config(given, kv_bytes, **fields, **MODES[mode])
    items = requests_of(given, given.workload, given.requests)
    row = await measure(
        config, items, mode=mode, workload=given.workload, seed=given.seed,
        limit_s=given.seconds, until=given.until,
    )  # fmt: skip
    print(
        f"{given.model}, {link or 'no pool'}, {kv_bytes / 2**30:.3f} GiB: "
        f"{row.steady_tokens_per_s:.0f} tokens/s",
        flush=True,
    )
    return row


def _point(given: argparse.Namespace, link: str, off: Row, pie: Row, runs: int) -> Point:
    shape = shape_named(given.model)
    gpu = gpu_named(given.gpu)
    rate = link_named(link).bytes_per_s / (gpu.efficiency * gpu.hbm_bytes_per_s)
    least = least_kv_bound(shape.weight_bytes, (1 - given.within), off.kv_bytes, rate)
    layout = model_layout(engine_config(given, off.kv_bytes), shape, shape.kv_item_bytes)
    slot_bytes = layout.ring_layers * layout.layer_block_bytes
    ring_bytes = round(RING_SLOTS * pie.mean_streamed_blocks * slot_bytes)
    off_total = weights_of(shape) + off.kv_bytes
    pie_total = weights_of(shape) + pie.kv_bytes + ring_bytes
    return Point(
        model=given.model,
        link=link,
        off_kv_bytes=off.kv_bytes,
        off_tokens_per_s=off.steady_tokens_per_s,
        pie_kv_bytes=pie.kv_bytes,
        pie_tokens_per_s=pie.steady_tokens_per_s,
        factor=off.kv_bytes / pie.kv_bytes,
        bound_factor=off.kv_bytes / least if least else None,
        weight_bytes=weights_of(shape),
        ring_bytes=ring_bytes,
        off_total_bytes=off_total,
        pie_total_bytes=pie_total,
        total_factor=off_total / pie_total,
        mean_streamed_blocks=pie.mean_streamed_blocks,
        link_busy_share=pie.link_busy_share,
        stall_share=pie.stall_share,
        runs=runs,
    )


def weights_of(shape: ModelShape) -> int:
    """Bytes on the GPU: what an iteration reads, and the embedding."""
    return shape.weight_bytes + shape.head_parameters * shape.weight_item_bytes


def least_kv_bound(weight_bytes: float, share: float, kv_bytes: float, rate: float) -> float:
    """The least KV memory with which decoding can be as fast as without a pool, by arithmetic.

    With K resident and O = a (W + K) streamed, a = r / (1 - 2 r), an iteration takes
    (W + K + 2 O) / B for a batch in proportion to K + O. Solved for K at the unpooled engine's
    K_0 / (W + K_0).

    Args:
        weight_bytes: W.
        share: of the unpooled throughput that is to be reached.
        kv_bytes: K_0.
        rate: r, link over memory at the speed that kernels reach; below 1/2.

    Returns:
        Bytes; 0: what is streamed does it alone.
    """
    hidden = rate / (1 - 2 * rate)
    wanted = share * kv_bytes / (weight_bytes + kv_bytes) * (1 + 2 * hidden)
    return max(0.0, weight_bytes * (wanted - hidden) / (1 + hidden - wanted))


def draw(figure: Any, points: Sequence[Point]) -> None:
    """Factor over the unpooled engine's KV memory, a line per model and link."""
    axes = figure.subplots()
    for model, link in dict.fromkeys((point.model, point.link) for point in points):
        line = [point for point in points if (point.model, point.link) == (model, link)]
        sizes = [point.off_kv_bytes / 2**30 for point in line]
        axes.plot(sizes, [point.factor for point in line], "o-", label=f"{model}, {link}")
    axes.axhline(FIRST_GUESS, color="gray", ls="--", label="the paper's 1.67")
    axes.set_ylim(bottom=1)
    axes.set_xlabel("KV memory of the unpooled engine, GiB")
    axes.set_ylabel("times as much as Pie needs for the same throughput")
    axes.grid(alpha=0.3)
    axes.legend()


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, name="equal_memory")
    parser.set_defaults(host_pool="64GiB")
    add_context(parser)
    add = parser.add_argument
    add("--gpu", default="h200", help="of the bound, and what is simulated")
    add("--link", nargs="+", default=["nvlink"], help="of the bound; each of them is simulated")
    add("--kv", nargs="+", default=["4GiB", "7GiB", "12GiB", "20GiB"], help="without a pool")
    add("--within", type=float, default=0.02, help="throughput that may be missing")
    add("--precision", type=float, default=0.03, help="of the memory that is found")
    add("--workload", default="sharegpt-like", help="or a trace's file")
    add("--requests", type=int, default=1000, help="all there at once")
    add("--seconds", type=float, help="cut every run off; without it all requests are answered")
    add("--until", type=float, default=1.0, help="cut off at this share of the asked output")
    return parser


if __name__ == "__main__":
    main()
