"""Latency and throughput against request rate (Pie, section 6.1), and overload.

    python -m scripts.paper.rates --kv 4GiB --workload sharegpt-like alpaca-like trace.csv

Each workload is first put on every mode all at once: what it then answers per second is its
saturating rate. `--shares` are shares of the rate that saturates `off`, for all modes alike;
`--own` are shares of each mode's own, for overload. Requests arrive for --seconds as a Poisson
process (a trace also at its own times, scaled: `--arrivals trace`) and all of them are answered,
so that no slow one is missing from a percentile; `--limit` cuts a run off nevertheless. What it
comes to, latency where `off` saturates and overload against saturation, is printed at the end.

`--off-rate` gives the rate that saturates `off`, one per workload, from an earlier run; `off` is
then not run all at once again. `vllm` and `vllm-offload` need --vllm; each runs all its rows in one
process, after our own modes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pie_async import Engine
from pie_async.config import parse_size
from pie_async.workload import WorkItem
from scripts._bench_gpu.peers import PeerFailed
from scripts.paper.load import Engines, Row, measure_on
from scripts.paper.options import (
    MODES,
    Budget,
    add_budget,
    add_context,
    engine_config,
    loop_of,
    parser_of,
    requests_of,
)
from scripts.paper.progress import Progress
from scripts.paper.results import Results, replot
from scripts.paper.vllm_peer import (
    VLLM_MODES,
    add_vllm,
    check_vllm,
    measure_vllm,
    vllm_running,
)

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
    parser = _parser()
    given = parser.parse_args()
    check_vllm(parser, given)
    if given.off_rate and len(given.off_rate) != len(given.workload):
        parser.error("--off-rate needs one rate for each --workload")
    if given.plot_only:
        replot(given.name, given.results, Point, draw)
        return
    facts = {"seed": given.seed, "settings": given.set, "arrivals": given.arrivals}
    results = Results(given.name, given.results, facts, draw)
    points: list[Point] = []

    def add(point: Point) -> None:
        points.append(point)
        results.add(point)

    saturating = dict(zip(given.workload, given.off_rate, strict=True)) if given.off_rate else {}
    run = _Run(given, Budget(given.budget), add, saturating)
    own = [mode for mode in given.modes if mode not in VLLM_MODES]
    with loop_of(given) as runner:
        engines = Engines(runner)

        def measured(workload: str, mode: str, requests: int, rate: float | None) -> Row:
            kv_bytes = parse_size(given.kv, option="--kv")
            engine = engines.of(engine_config(given, kv_bytes, **MODES[mode]))
            return runner.run(_measured(given, engine, workload, mode, requests, rate))

        for mode in own:
            for workload in given.workload:
                run.workload(workload, [mode], measured)
        engines.close()
    for mode in given.modes:
        if mode in VLLM_MODES and run.budget.allows(mode):
            _vllm(given, run, mode)
    run.budget.tell()
    for line in summary(points):
        print(line)
    results.finish()


Measured = Callable[[str, str, int, float | None], Row]
"""Workload, mode, requests, rate or all at once."""


class _Run:
    """All rates of some modes; what saturates `off` is kept between them."""

    def __init__(
        self,
        given: argparse.Namespace,
        budget: Budget,
        add: Callable[[Point], None],
        off_saturates: dict[str, float],
    ) -> None:
        self.budget = budget
        self._given = given
        self._add = add
        self._off = off_saturates

    @property
    def known(self) -> Collection[str]:
        """Workloads of which it is known what saturates `off`."""
        return list(self._off)

    def workload(self, workload: str, modes: Sequence[str], run: Measured) -> None:
        """All at once first, then every rate."""
        given = self._given
        at_once = requests_of(given, workload, given.saturating_requests)
        mean_output = sum(item.output_tokens for item in at_once) / len(at_once)
        saturating: dict[str, float] = {}
        off_first = [] if workload in self._off else ["off"]
        for mode in dict.fromkeys([*off_first, *modes]):
            if mode == "off" and workload in self._off:
                saturating[mode] = self._off[workload]
                continue
            needed = mode == "off" or given.own
            if not needed or not self.budget.allows(f"{workload} {mode} all at once"):
                continue
            row = run(workload, mode, given.saturating_requests, None)
            if not row.steady_tokens_per_s:
                raise SystemExit(f"{mode} put out next to nothing: raise --saturating-seconds")
            saturating[mode] = row.steady_tokens_per_s / mean_output
            self._add(_point(row, 0.0, 0.0))
        if "off" in saturating:
            self._off[workload] = saturating["off"]
            print(f"[{workload}: --off-rate {self._off[workload]:.4f}]", flush=True)
        for mode in modes:
            self._rates(workload, mode, saturating.get(mode), run)

    def _rates(self, workload: str, mode: str, own: float | None, run: Measured) -> None:
        given = self._given
        if (off := self._off.get(workload)) is None:
            return  # named as left out already
        rates = {share * off for share in given.shares}
        if own is not None:
            rates |= {share * own for share in given.own}
        progress = Progress(len(rates), self.budget)
        for rate in sorted(rates):
            if not progress.begins(f"{workload} {mode} {rate:.3f}/s"):
                continue
            requests = max(FEWEST_REQUESTS, round(rate * given.seconds))
            row = run(workload, mode, requests, rate)
            self._add(_point(row, rate / off, rate / own if own else 0.0))


def _vllm(given: argparse.Namespace, run: _Run, mode: str) -> None:
    """A peer that fails costs what it had still to do."""
    config = engine_config(given, parse_size(given.kv, option="--kv"))
    try:
        with vllm_running(given, config, mode) as peer:

            def measured(workload: str, mode: str, requests: int, rate: float | None) -> Row:
                return measure_vllm(
                    peer, given, config, _items(given, workload, requests, rate), mode=mode,
                    workload=workload, requests_per_s=rate or 0.0, limit_s=_limit_s(given, rate),
                )  # fmt: skip

            for workload in given.workload:
                if workload in run.known:
                    run.workload(workload, [mode], measured)
    except PeerFailed as failure:
        print(f"{mode}: {failure}", flush=True)


async def _measured(
    given: argparse.Namespace,
    engine: Engine,
    workload: str,
    mode: str,
    requests: int,
    rate: float | None,
) -> Row:
    return await measure_on(
        engine,
        _items(given, workload, requests, rate),
        mode=mode,
        workload=workload,
        requests_per_s=rate or 0.0,
        seed=given.seed,
        limit_s=_limit_s(given, rate),
    )


def _items(
    given: argparse.Namespace, workload: str, requests: int, rate: float | None
) -> list[WorkItem]:
    as_traced = given.arrivals == "trace"
    return requests_of(given, workload, requests, rate=rate, as_traced=as_traced)


def _limit_s(given: argparse.Namespace, rate: float | None) -> float | None:
    limit: float | None = given.limit if rate else given.saturating_seconds
    return limit


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
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    workloads = list(dict.fromkeys(point.workload for point in points))
    panels = figure.subplots(1, len(workloads), squeeze=False)[0]
    for axes, workload in zip(panels, workloads, strict=True):
        here = [point for point in points if point.workload == workload and point.requests_per_s]
        for mode in dict.fromkeys(point.mode for point in here):
            line = sorted((p for p in here if p.mode == mode), key=lambda p: p.requests_per_s)
            rates = [point.requests_per_s for point in line]
            medians = [1e3 * point.normalized_p50_s for point in line]
            (drawn,) = axes.plot(rates, medians, "o-", label=mode)
            highest = [1e3 * point.normalized_p99_s for point in line]
            axes.plot(rates, highest, "--", color=drawn.get_color())
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("requests/s")
        axes.set_title(Path(workload).stem)
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("latency by output token, ms (dashed: p99)")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, name="rates")
    add_context(parser)
    add = parser.add_argument
    add("--kv", default="4GiB")
    add("--modes", nargs="+", default=list(MODES), choices=[*MODES, *VLLM_MODES])
    add("--workload", nargs="+", default=["sharegpt-like"], help="or an Azure trace's CSV file")
    add("--shares", nargs="*", type=float, default=list(SHARES), help="of what saturates off")
    add("--own", nargs="*", type=float, default=list(OWN_SHARES), help="of what saturates the mode")
    add("--arrivals", choices=["poisson", "trace"], default="poisson")
    add("--seconds", type=float, default=90.0, help="requests arrive for so long")
    add("--limit", type=float, help="seconds after which a run is cut off")
    add("--saturating-requests", type=int, default=2000)
    add("--saturating-seconds", type=float, default=90.0)
    add("--off-rate", nargs="+", type=float, help="requests/s that saturate off, by workload")
    add_budget(parser)
    add_vllm(parser)
    return parser


if __name__ == "__main__":
    main()
