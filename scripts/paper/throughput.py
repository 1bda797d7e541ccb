"""Throughput and latency of one load under several ways to deal with too little KV memory.

    python -m scripts.paper.throughput --model qwen2.5-32b --kv 2GiB 4GiB 7GiB 12GiB

Every size of the device's KV memory is run in every mode: `off` (no pool: preemption
recomputes), `parking` (preempted sequences wait in the pool, nothing is streamed) and `pie`
(the governor decides what is streamed). All requests are there at once, or arrive at --rate.
Beside each row stands what the link leaves of streaming at best (`bound`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from pie_async.config import parse_size
from scripts.paper.load import Row, measure
from scripts.paper.options import MODES, engine_config, loop_of, parser_of, requests_of
from scripts.paper.results import Results, replot


def main() -> None:
    """Run all modes, or draw what was measured."""
    given = _parser().parse_args()
    if given.plot_only:
        replot(given.name, given.results, Row, draw)
        return
    facts = {"seed": given.seed, "settings": given.set}
    results = Results(given.name, given.results, facts, draw)
    with loop_of(given) as runner:
        for kv in given.kv:
            for mode in given.modes:
                results.add(runner.run(_run(given, parse_size(kv, option="--kv"), mode)))
    results.finish()


async def _run(given: argparse.Namespace, kv_bytes: int, mode: str) -> Row:
    return await measure(
        engine_config(given, kv_bytes, **MODES[mode]),
        requests_of(given, given.workload, given.requests, rate=given.rate),
        mode=mode,
        workload=given.workload,
        requests_per_s=given.rate or 0.0,
        seed=given.seed,
        limit_s=given.seconds,
    )


def draw(figure: Any, rows: Sequence[Row]) -> None:
    """Steady throughput over KV memory, a line per mode."""
    axes = figure.subplots()
    for mode in dict.fromkeys(row.mode for row in rows):
        line = [row for row in rows if row.mode == mode]
        sizes = [row.kv_bytes / 2**30 for row in line]
        axes.plot(sizes, [row.steady_tokens_per_s for row in line], "o-", label=mode)
    axes.set_xlabel("KV memory on the device, GiB")
    axes.set_ylabel("output tokens/s while the batch is full")
    axes.set_title(f"{rows[0].model} (random weights), {rows[0].workload}")
    axes.grid(alpha=0.3)
    axes.legend()


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, name="throughput")
    parser.set_defaults(context=4096)
    add = parser.add_argument
    add("--kv", nargs="+", default=["2GiB", "4GiB", "7GiB", "12GiB"])
    add("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    add("--workload", default="sharegpt-like", help="or the Azure trace's CSV file")
    add("--requests", type=int, default=300)
    add("--rate", type=float, help="requests/s; all at once without it")
    add("--seconds", type=float, help="cut the run off; without it all requests are answered")
    return parser


if __name__ == "__main__":
    main()
