"""FlexGen's work at FlexGen's GPU memory: one batch, KV on the GPU, in half or on the host.

    pip download --no-deps -d wheels flexgen attrs
    for wheel in wheels/*.whl; do python -m zipfile -e $wheel packages; done
    python -m scripts.paper.flexgen --flexgen packages

FlexGen runs its own benchmark (dummy weights) for every placement of the KV. Pie then does the
same work (random weights) with as much GPU memory in all as FlexGen's peak with half of the KV on
the host, or as --gpu-memory says. Rates are as FlexGen defines them: prefill lasts until every
request has its first token, the decode rate is tokens after that by the time after that, the whole
rate all output tokens by all the time. On the simulated device, which has no FlexGen, only Pie
runs, with --kv.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from pie_async.config import parse_size
from pie_async.measurements import RequestTimes
from pie_async.workload import fixed_lengths
from scripts._bench_gpu.peers import PeerFailed, results_of
from scripts.paper.load import Row, measure
from scripts.paper.options import Budget, add_budget, engine_config, loop_of, parser_of
from scripts.paper.progress import Progress
from scripts.paper.results import Results, replot

PLACEMENTS = {"gpu": 0, "half": 50, "host": 100}
"""Percent of the KV that FlexGen keeps on the host."""
DRIVER = Path(__file__).with_name("flexgen_driver.py")
PEAK_BYTES = round(33.7 * 2**30)
"""FlexGen's with half of the KV on the host, where it is not measured in this run."""


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """One engine, one output length."""

    engine: str
    """`pie`, or `flexgen` and where its KV is."""
    output_tokens: int
    """Of each request."""
    gpu_bytes: int
    """FlexGen: peak of what it allocated; Pie: what it was allowed in all."""
    prefill_s: float
    decode_tokens_per_s: float
    total_tokens_per_s: float
    decode_gain: float = 0.0
    """Over FlexGen with half of the KV on the host; 0: that was not measured."""
    total_gain: float = 0.0
    kv_bytes: int = 0
    """Pie's, on the GPU."""
    mean_streamed_blocks: float = 0.0
    stall_share: float = 0.0


def main() -> None:
    """Run both, or draw what was measured."""
    parser = _parser()
    given = parser.parse_args()
    if given.plot_only:
        replot(given.name, given.results, Rates, draw)
        return
    is_sim = given.device == "sim"
    if given.flexgen is None and "flexgen" in given.engines and not is_sim:
        parser.error("FlexGen needs --flexgen PATH, its unpacked packages; or --engines pie")
    budget = Budget(given.budget)
    facts = {"seed": given.seed, "settings": given.set, "batch": given.batch}
    results = Results(given.name, given.results, facts, draw)
    placements = given.placements if "flexgen" in given.engines and not is_sim else []
    parts = len(given.outputs) * (len(placements) + ("pie" in given.engines))
    progress = Progress(parts, budget)
    with loop_of(given) as runner:
        for output in given.outputs:
            half: Rates | None = None
            for placement in placements:
                name = f"flexgen {placement}, {output} tokens"
                if progress.begins(name) and (found := _flexgen(given, placement, output)):
                    half = found if placement == "half" else half
                    results.add(found)
            if "pie" in given.engines and progress.begins(f"pie, {output} tokens"):
                results.add(runner.run(_pie(given, output, half)))
    budget.tell()
    results.finish()


def _flexgen(given: argparse.Namespace, placement: str, output: int) -> Rates | None:
    """None, with a line that says why, where it fails."""
    on_host = PLACEMENTS[placement]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [
            "--model", f"facebook/{given.model}", "--path", "_DUMMY_", "--offload-dir", scratch,
            "--prompt-len", str(given.prompt), "--gen-len", str(output), "--log-file", "none",
            "--gpu-batch-size", str(given.batch), "--verbose", "0",
            "--percent", "100", "0", str(100 - on_host), str(on_host), "100", "0",
        ]  # fmt: skip
        try:
            (found,) = results_of(
                DRIVER, [json.dumps(arguments)], packages=given.flexgen, seconds=given.peer_seconds,
                environment={"PYTHONSAFEPATH": "1"},  # this folder's modules are not FlexGen's
            )  # fmt: skip
        except PeerFailed as failure:
            print(f"flexgen {placement}: {failure}", flush=True)
            return None
    return flexgen_rates(found, placement, output)


def flexgen_rates(found: dict[str, Any], placement: str, output: int) -> Rates:
    """What its driver told."""
    return Rates(
        engine=f"flexgen {placement}",
        output_tokens=output,
        gpu_bytes=found["gpu_peak_bytes"],
        prefill_s=found["prefill_s"],
        decode_tokens_per_s=found["decode_tokens_per_s"],
        total_tokens_per_s=found["total_tokens_per_s"],
    )


async def _pie(given: argparse.Namespace, output: int, half: Rates | None) -> Rates:
    fields: dict[str, Any] = {
        "max_model_len": given.prompt + output,
        "max_running_sequences": given.batch,
    }
    gpu_bytes = half.gpu_bytes if half else PEAK_BYTES
    if given.gpu_memory:
        gpu_bytes = parse_size(given.gpu_memory, option="--gpu-memory")
    if given.device == "cuda" and given.kv is None:
        fields |= {"gpu_memory": gpu_bytes, "device_kv_bytes": None}
    kv_bytes = parse_size(given.kv or "1GiB", option="--kv")
    items = fixed_lengths(
        prompt_tokens=given.prompt, output_tokens=output, num_requests=given.batch,
        context_tokens=given.prompt + output,
    )  # fmt: skip
    seen: list[RequestTimes] = []
    row = await measure(
        engine_config(given, kv_bytes, **fields), items, mode="pie", workload="flexgen",
        seed=given.seed, on_end=seen.extend,
    )  # fmt: skip
    return pie_rates(row, seen, output, gpu_bytes, half)


def pie_rates(
    row: Row, seen: Sequence[RequestTimes], output: int, gpu_bytes: int, half: Rates | None
) -> Rates:
    """Rates as FlexGen's: tokens that came before the last request's first one do not decode."""
    began_s = min(request.submitted_s for request in seen)
    prefilled_s = max(request.token_s[0] for request in seen)
    ended_s = max(request.token_s[-1] for request in seen)
    times_s = [time_s for request in seen for time_s in request.token_s]
    decoded = sum(time_s > prefilled_s for time_s in times_s)
    decode = decoded / max(1e-9, ended_s - prefilled_s)
    total = len(times_s) / (ended_s - began_s)
    return Rates(
        engine="pie",
        output_tokens=output,
        gpu_bytes=gpu_bytes,
        prefill_s=prefilled_s - began_s,
        decode_tokens_per_s=decode,
        total_tokens_per_s=total,
        decode_gain=decode / half.decode_tokens_per_s if half else 0.0,
        total_gain=total / half.total_tokens_per_s if half else 0.0,
        kv_bytes=row.kv_bytes,
        mean_streamed_blocks=row.mean_streamed_blocks,
        stall_share=row.stall_share,
    )


def draw(figure: Any, rows: Sequence[Rates]) -> None:
    """Whole-run and decode rate of every engine, a panel per output length."""
    lengths = list(dict.fromkeys(row.output_tokens for row in rows))
    panels = figure.subplots(1, len(lengths), squeeze=False)[0]
    for axes, length in zip(panels, lengths, strict=True):
        here = [row for row in rows if row.output_tokens == length]
        names = [f"{row.engine}\n{row.gpu_bytes / 2**30:.1f} GiB" for row in here]
        axes.bar(names, [row.decode_tokens_per_s for row in here], width=0.4, align="edge")
        axes.bar(names, [row.total_tokens_per_s for row in here], width=-0.4, align="edge")
        axes.set_yscale("log")
        axes.set_title(f"{length} output tokens")
    panels[0].set_ylabel("output tokens/s (right: decoding, left: all in all)")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, name="flexgen")
    parser.set_defaults(model="opt-13b")
    add = parser.add_argument
    add("--flexgen", type=Path, metavar="PATH", help="its unpacked packages")
    add("--engines", nargs="+", default=["flexgen", "pie"], choices=["flexgen", "pie"])
    add("--placements", nargs="+", default=list(PLACEMENTS), choices=list(PLACEMENTS))
    add("--batch", type=int, default=32)
    add("--prompt", type=int, default=512, help="tokens")
    add("--outputs", type=int, nargs="+", default=[32, 128], help="tokens")
    add("--gpu-memory", help="of Pie in all, instead of FlexGen's peak")
    add("--kv", help="of Pie on the device, instead of what its memory leaves")
    add("--peer-seconds", type=float, default=240.0, help="most that a run of FlexGen may take")
    add_budget(parser)
    return parser


if __name__ == "__main__":
    main()
