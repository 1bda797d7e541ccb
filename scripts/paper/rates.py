"""Latency and throughput against request rate (Pie, section 6.1), and overload.

    python -m scripts.paper.rates --kv 4GiB --workload sharegpt-like alpaca-like trace.csv

Each workload is first put on every mode all at once: what it then answers per second is its
saturating rate. `--shares` are shares of the rate that saturates `off`, for all modes alike;
`--own` are shares of each mode's own, for overload. Requests arrive for --seconds as a Poisson
process (a trace also at its own times, scaled: `--arrivals trace`) and all of them are answered,
so that no slow one is missing from a percentile; `--limit` cuts a run off nevertheless. What it
comes to, latency where `off` saturates and overload against saturation, is printed at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pie_async.config import parse_size
from scripts.paper.load import Row, measure
from scripts.paper.options import MODES, engine_config, loop_of, parser_of, requests_of
from scripts.paper.results import Results, replot

SHARES = (0.5, 0.7, 0.85, 1.0, 1.15)
OWN_SHARES = (1.0, 3.0)
FEWEST_REQUESTS = 40


class Point(Row, frozen=True, kw_only=True):
    """One workload in one mode at one rate."""

    off_share: float
    """The rate as a share of the one that saturates `off`; 0: all at once."""
    own_share: float
    """The same of the one that saturates this mode."""


def main() -> None:
    """Run every workload, or draw what was measured."""
    given = _parser().parse_args()
    if given.plot_only:
        replot(given.name, given.results, Point, draw)
        return
    facts = {"seed": given.seed, "settings": given.set, "arrivals": given.arrivals}
    results = Results(given.name, given.results, facts, draw)
    points: list[Point] = []

    def add(point: Point) -> None:
        points.append(point)
        results.add(point)

    with loop_of(given) as runner:
        for workload in given.workload:
            _workload(given, workload, add, runner.run)
    for line in summary(points):
        print(line)
    results.finish()


def _workload(
    given: argparse.Namespace,
    workload: str,
    add: Callable[[Point], None],
    run: Callable[[Any], Row],
) -> None:
    saturating: dict[str, float] = {}
    at_once = requests_of(given, workload, given.saturating_requests)
    mean_output = sum(item.output_tokens for item in at_once) / len(at_once)
    for mode in dict.fromkeys(["off", *given.modes]):
        row = run(_run(given, workload, mode, given.saturating_requests, None))
        if not row.steady_tokens_per_s:
            raise SystemExit(f"{mode} put out next to nothing: raise --saturating-seconds")
        saturating[mode] = row.steady_tokens_per_s / mean_output
        add(_point(row, 0.0, 0.0))
    for mode in given.modes:
        rates = {share * saturating["off"] for share in given.shares}
        rates |= {share * saturating[mode] for share in given.own}
        for count, rate in enumerate(sorted(rates), start=1):
            print(f"[{workload}, {mode}: rate {count} of {len(rates)}]", flush=True)
            requests = max(FEWEST_REQUESTS, round(rate * given.seconds))
            row = run(_run(given, workload, mode, requests, rate))
            add(_point(row, rate / saturating["off"], rate / saturating[mode]))


async def _run(
    given: argparse.Namespace, workload: str, mode: str, requests: int, rate: float | None
) -> Row:
    as_traced = given.arrivals == "trace"
    return await measure(
        engine_config(given, parse_size(given.kv, option="--kv"), **MODES[mode]),
        requests_of(given, workload, requests, rate=rate, as_traced=as_traced),
        mode=mode,
        workload=workload,
        requests_per_s=rate or 0.0,
        seed=given.seed,
        limit_s=given.limit if rate else given.saturating_seconds,
    )


def _point(row: Row, off_share: float, own_share: float) -> Point:
    return Point(**msgspec.structs.asdict(row), off_share=off_share, own_share=own_share)


def summary(points: Sequence[Point]) -> Iterator[str]:
    """Latency against `off` at the rate that saturates it; overload against saturation."""
    lines = dict.fromkeys((point.workload, point.mode) for point in points)
    for workload, mode in lines:
        own = [p for p in points if (p.workload, p.mode) == (workload, mode) and p.requests_per_s]
        off = _at(points, workload, "off", lambda point: point.off_share)
        here = _at(points, workload, mode, lambda point: point.off_share)
        if off and here and mode != "off":
            yield (
                f"{workload}, {mode} where off saturates: normalised latency p50 "
                f"{here.normalized_p50_s / off.normalized_p50_s:.2f}, p99 "
                f"{here.normalized_p99_s / off.normalized_p99_s:.2f} of off's"
            )
        full = _at(points, workload, mode, lambda point: point.own_share)
        worst = max(own, key=lambda point: point.own_share, default=None)
        if full and worst and worst.own_share > full.own_share:
            peak = max(point.steady_tokens_per_s for point in own)
            yield (
                f"{workload}, {mode} at {worst.own_share:.1f} of its saturating rate: throughput "
                f"{worst.steady_tokens_per_s / peak:.3f} of its peak, TPOT p99 "
                f"{worst.tpot_p99_s / full.tpot_p99_s:.2f} of that at saturation, longest gap "
                f"{worst.longest_gap_s:.2f} s, answered {worst.requests} of {worst.sent}"
            )


def _at(
    points: Sequence[Point], workload: str, mode: str, share: Callable[[Point], float]
) -> Point | None:
    """The mode's point whose rate is all of what `share` is a share of."""
    return next(
        (
            p
            for p in points
            if (p.workload, p.mode) == (workload, mode) and abs(share(p) - 1) < 1e-9
        ),
        None,
    )


def draw(figure: Any, points: Sequence[Point]) -> None:
    """Normalised latency (median solid, p99 dashed) over rate; a panel per workload."""
    workloads = list(dict.fromkeys(point.workload for point in points))
    panels = figure.subplots(1, len(workloads), squeeze=False)[0]
    for axes, workload in zip(panels, workloads, strict=True):
        here = [point for point in points if point.workload == workload and point.requests_per_s]
        for mode in dict.fromkeys(point.mode for point in here):
            line = sorted((p for p in here if p.mode == mode), key=lambda p: p.requests_per_s)
            rates = [point.requests_per_s for point in line]
            (drawn,) = axes.plot(rates, [p.normalized_p50_s for p in line], "o-", label=mode)
            axes.plot(rates, [p.normalized_p99_s for p in line], "--", color=drawn.get_color())
        axes.set_yscale("log")
        axes.set_xlabel("requests/s")
        axes.set_title(Path(workload).stem)
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("latency by output token, s (dashed: p99)")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, name="rates")
    add = parser.add_argument
    add("--kv", default="4GiB")
    add("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    add("--workload", nargs="+", default=["sharegpt-like"], help="or an Azure trace's CSV file")
    add("--shares", nargs="*", type=float, default=list(SHARES), help="of what saturates off")
    add("--own", nargs="*", type=float, default=list(OWN_SHARES), help="of what saturates the mode")
    add("--arrivals", choices=["poisson", "trace"], default="poisson")
    add("--seconds", type=float, default=90.0, help="requests arrive for so long")
    add("--limit", type=float, help="seconds after which a run is cut off")
    add("--saturating-requests", type=int, default=2000)
    add("--saturating-seconds", type=float, default=90.0)
    return parser


if __name__ == "__main__":
    main()
