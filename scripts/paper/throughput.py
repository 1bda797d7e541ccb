"""Throughput and latency of one load under several ways to deal with too little KV memory.

    python -m scripts.paper.throughput --model qwen2.5-32b --kv 2GiB 4GiB 7GiB 12GiB

Every size of the device's KV memory is run in every mode: `off` (no pool: preemption
recomputes), `parking` (preempted sequences wait in the pool, nothing is streamed) and `pie`
(the governor decides what is streamed). All requests are there at once, or arrive at --rate.
Beside each row stands what the link leaves of streaming at best (`bound`). `vllm` and
`vllm-offload` (its own offloading to as much host memory as our pool has) need --vllm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from pie_async.config import parse_size
from scripts._bench_gpu.peers import PeerFailed
from scripts.paper.load import Row, measure
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


def main() -> None:
    """Run all modes, or draw what was measured."""
    parser = _parser()
    given = parser.parse_args()
    check_vllm(parser, given)
    budget = Budget(given.budget)
    if given.plot_only:
        replot(given.name, given.results, Row, draw)
        return
    facts = {"seed": given.seed, "settings": given.set}
    results = Results(given.name, given.results, facts, draw)
    progress = Progress(len(given.kv) * len(given.modes), budget)
    with loop_of(given) as runner:
        for kv in given.kv:
            for mode in given.modes:
                if not progress.begins(f"{kv} {mode}"):
                    continue
                kv_bytes = parse_size(kv, option="--kv")
                if mode in VLLM_MODES:
                    _add_vllm(given, results, kv_bytes, mode)
                else:
                    results.add(runner.run(_run(given, kv_bytes, mode)))
    budget.tell()
    results.finish()


def _add_vllm(given: argparse.Namespace, results: Results, kv_bytes: int, mode: str) -> None:
    """A peer that fails costs its row alone."""
    config = engine_config(given, kv_bytes)
    items = requests_of(given, given.workload, given.requests, rate=given.rate)
    try:
        with vllm_running(given, config, mode) as peer:
            row = measure_vllm(
                peer, given, config, items, mode=mode, workload=given.workload,
                requests_per_s=given.rate or 0.0, limit_s=given.seconds, until=given.until,
            )  # fmt: skip
    except PeerFailed as failure:
        print(f"{mode}: {failure}", flush=True)
        return
    results.add(row)


async def _run(given: argparse.Namespace, kv_bytes: int, mode: str) -> Row:
    return await measure(
        engine_config(given, kv_bytes, **MODES[mode]),
        requests_of(given, given.workload, given.requests, rate=given.rate),
        mode=mode,
        workload=given.workload,
        requests_per_s=given.rate or 0.0,
        seed=given.seed,
        limit_s=given.seconds,
        until=given.until,
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
    add_context(parser)
    parser.set_defaults(context=4096)
    add = parser.add_argument
    add("--kv", nargs="+", default=["2GiB", "4GiB", "7GiB", "12GiB"])
    add("--modes", nargs="+", default=list(MODES), choices=[*MODES, *VLLM_MODES])
    add("--workload", default="sharegpt-like", help="or the Azure trace's CSV file")
    add("--requests", type=int, default=300)
    add("--rate", type=float, help="requests/s; all at once without it")
    add("--seconds", type=float, help="cut the run off; without it all requests are answered")
    add("--until", type=float, default=1.0, help="cut off at this share of the asked output")
    add_budget(parser)
    add_vllm(parser)
    return parser


if __name__ == "__main__":
    main()
