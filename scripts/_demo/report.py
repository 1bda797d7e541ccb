"""What the demo measured, as a short table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.table import Table

from pie_async.measurements import Distribution, LoadSummary
from scripts._demo.load import Load
from scripts._demo.watch import PoolSample

_BARS = "▁▂▃▄▅▆▇█"


def report(load: Load, summary: LoadSummary, samples: Sequence[PoolSample]) -> Table:
    """The run in a table. `samples` are in order of time, at least one."""
    table = Table(title="What was measured", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "load",
        f"{summary.requests} concurrent chats, {summary.prompt_tokens} prompt and "
        f"{summary.output_tokens} output tokens in {summary.duration_s:.1f} s",
    )
    table.add_row(
        "KV blocks",
        f"{load.needed_blocks} needed, {load.arena_blocks} in the device arena: "
        f"{load.needed_blocks / load.arena_blocks:.1f} times as many",
    )
    table.add_row("throughput", f"{summary.output_tokens_per_s:.0f} output tokens/s")
    table.add_row("TTFT", _milliseconds(summary.ttft_s))
    table.add_row("ITL", _milliseconds(summary.itl_s))
    table.add_row(
        "blocks, at most",
        f"{max(s.resident_blocks for s in samples)} resident, "
        f"{max(s.streamed_blocks for s in samples)} streamed, "
        f"{max(s.parked_blocks for s in samples)} parked",
    )
    table.add_row("stall share", f"{samples[-1].stall_share:.1%} of the compute time")
    ratios = [sample.expansion_ratio for sample in samples]
    table.add_row("expansion ratio", f"{sparkline(ratios)} up to {max(ratios):.2f}")
    return table


def _milliseconds(times_s: Distribution | None) -> str:
    if times_s is None:
        return "none"
    return f"p50 {times_s.p50 * 1e3:.0f} ms, p99 {times_s.p99 * 1e3:.0f} ms"


def sparkline(values: Sequence[float], *, width: int = 40, floor: float = 1.0) -> str:
    """Values over time as bars, from `floor` (lowest bar) to their maximum (highest).

    More values than `width` are put together, each bar showing the largest of its own.
    """
    bars = min(width, len(values))
    edges = [index * len(values) // bars for index in range(bars + 1)]
    peaks = [max(values[low:high]) for low, high in itertools.pairwise(edges)]
    span = max(max(peaks) - floor, 1e-9)
    shares = (min(max((peak - floor) / span, 0.0), 1.0) for peak in peaks)
    return "".join(_BARS[round(share * (len(_BARS) - 1))] for share in shares)
