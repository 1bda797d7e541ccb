"""A benchmark's result as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from pie_async.cli.load import PoolSummary
from pie_async.config import format_size
from pie_async.errors import ConfigError
from pie_async.measurements import Distribution, LoadSummary
from pie_async.metrics import LinkUse


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run of `pie-async bench`. Times are seconds, sizes bytes."""

    version: str
    date: str
    target: str
    """"engine", or the server's URL."""
    model: str
    clock: str
    """"real" or "virtual" (the simulated device's)."""
    machine: str
    workload: dict[str, Any]
    engine: dict[str, Any] | None
    """The configuration of an engine in this process."""
    summary: LoadSummary
    pool: PoolSummary | None
    """None for a server, whose counters are not read."""
    link: LinkUse | None = None
    """As `pool`."""


def check_writable(path: Path) -> None:
    """Before a long run; leaves what is in the file.

    Raises:
        ConfigError: the file cannot be written.
    """
    with _failure_told(path), path.open("ab"):
        pass


def write_json(report: Report, path: Path) -> None:
    """
    Raises:
        ConfigError: the file cannot be written.
    """
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    with _failure_told(path):
        path.write_bytes(text + b"\n")


@contextmanager
def _failure_told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", option="json") from error


def tables(report: Report) -> Iterator[Table]:
    """The result: throughput, latencies and, for an engine, its pool."""
    yield _throughput(report)
    yield _latencies(report.summary)
    if report.pool is not None:
        yield _pool(report.pool, report.link)


def _throughput(report: Report) -> Table:
    summary = report.summary
    table = _two_columns(f"{report.model}, {report.workload['name']}")
    done = summary.requests - summary.failed
    table.add_row("requests", f"{done}" + (f" ({summary.failed} failed)" * bool(summary.failed)))
    clock = "" if report.clock == "real" else f" ({report.clock} time)"
    table.add_row("duration", f"{summary.duration_s:.2f} s{clock}")
    table.add_row(
        "prompt / output tokens", f"{summary.prompt_tokens:,} / {summary.output_tokens:,}"
    )
    table.add_row("requests/s", f"{summary.requests_per_s:.2f}")
    table.add_row("output tokens/s", f"{summary.output_tokens_per_s:,.1f}")
    table.add_row("total tokens/s", f"{summary.total_tokens_per_s:,.1f}")
    if summary.goodput_requests_per_s is not None:
        table.add_row(
            "goodput, requests/s",
            f"{summary.goodput_requests_per_s:.2f} ({summary.goodput_share or 0:.0%} of all)",
        )
    return table


def _latencies(summary: LoadSummary) -> Table:
    table = Table(title="latency, ms", title_justify="left", show_edge=False)
    table.add_column("")
    for name in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    for name, found in (
        ("TTFT", summary.ttft_s),
        ("TPOT", summary.tpot_s),
        ("ITL", summary.itl_s),
        ("end to end", summary.e2e_s),
    ):
        table.add_row(name, *_milliseconds(found))
    return table


def _milliseconds(found: Distribution | None) -> list[str]:
    if found is None:
        return ["-"] * 5
    values = (found.mean, found.p50, found.p90, found.p99, found.max)
    return [f"{value * 1000:,.2f}" for value in values]


def _pool(pool: PoolSummary, link: LinkUse | None) -> Table:
    table = _two_columns("memory and swapping")
    table.add_row(
        "device arena",
        f"{pool.device_blocks:,} blocks ({format_size(pool.device_blocks * pool.block_bytes)})",
    )
    table.add_row("resident blocks, peak", f"{pool.resident_blocks_peak:,}")
    table.add_row("streamed blocks, peak", f"{pool.streamed_blocks_peak:,}")
    table.add_row("parked blocks, peak", f"{pool.parked_blocks_peak:,} of {pool.host_blocks:,}")
    table.add_row("expansion ratio, peak", f"{pool.expansion_ratio_peak:.2f}")
    table.add_row("running sequences, peak", f"{pool.running_peak}")
    table.add_row("stall", f"{pool.stall_s:.3f} s")
    table.add_row("stall share", f"{pool.stall_share:.2%}")
    if pool.mask_wait_s:
        table.add_row("waited for masks", f"{pool.mask_wait_s:.3f} s")
    table.add_row(
        "preemptions", f"{pool.preemptions_parked} parked, {pool.preemptions_recomputed} recomputed"
    )
    table.add_row(
        "swapped in / out", f"{format_size(pool.h2d_bytes)} / {format_size(pool.d2h_bytes)}"
    )
    if link is not None:
        table.add_row(
            "link busy in / out", f"{link.h2d_busy_share:.1%} / {link.d2h_busy_share:.1%}"
        )
    table.add_row("demotions / promotions", f"{pool.demotions:,} / {pool.promotions:,} blocks")
    table.add_row("iterations", f"{pool.iterations:,}")
    return table


def _two_columns(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, show_edge=False)
    table.add_column()
    table.add_column(justify="right")
    return table
