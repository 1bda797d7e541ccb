"""Contexts that are larger than the device's KV memory: one, and several at once.

    python -m scripts.paper.long_context --model llama-3.1-8b --kv 2GiB --times 4 --requests 1 8

Each request's prompt and output take `--times` the device's KV memory. `pooled` runs them with
that memory and a pool; `resident` with memory for all, as what they are compared with. Beside the
rows stands the least time of a decode iteration: weights and KV read and what is streamed written
at the memory's rate, and no less than its copies take on the link.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import msgspec

from pie_async.assembly.sizing import SPARE_SLOTS
from pie_async.config import EngineConfig, parse_size
from pie_async.device.cost_model import ModelShape, gpu_named, shape_named
from pie_async.workload import WorkItem
from scripts.paper.load import Row, measure
from scripts.paper.options import Budget, add_budget, engine_config, loop_of, parser_of
from scripts.paper.progress import Progress
from scripts.paper.results import Results, replot

MODES = ("resident", "pooled")
WARM_UP_BLOCKS = 64
"""Device memory beyond what the requests fill, where everything is to be resident."""


class LongRow(Row, frozen=True, kw_only=True):
    """So many long requests at once."""

    context_tokens: int
    """Prompt and output of each."""
    kv_factor: float
    """KV of one request over the device's KV memory."""
    prompt_tokens_per_s: float
    """Of one request's prompt over the time to its first token, at the median."""
    decode_bound_s: float
    """Least time of an iteration that decodes one of the requests."""
    link_bytes_per_s: float
    """Measured; 0 where nothing was copied."""


def main() -> None:
    """Run all, or draw what was measured."""
    given = _parser().parse_args()
    if given.plot_only:
        replot(given.name, given.results, LongRow, draw)
        return
    facts = {"seed": given.seed, "settings": given.set, "times": given.times}
    results = Results(given.name, given.results, facts, draw)
    runs = [(requests, mode) for requests in given.requests for mode in given.modes]
    budget = Budget(given.budget)
    with loop_of(given) as runner:
        progress = Progress(len(runs), budget)
        for requests, mode in runs:
            if progress.begins(f"{requests} requests, {mode}"):
                results.add(runner.run(_run(given, requests, mode)))
    budget.tell()
    results.finish()


async def _run(given: argparse.Namespace, requests: int, mode: str) -> LongRow:
    shape = shape_named(given.model, option="--model")
    token_bytes = shape.token_layer_kv_bytes * shape.num_layers
    kv_bytes = parse_size(given.kv, option="--kv")
    context = round(given.times * kv_bytes / token_bytes)
    item = WorkItem(prompt_tokens=context - given.output, output_tokens=given.output)
    config = config_of(given, requests, mode, kv_bytes=kv_bytes, context=context)
    row = await measure(
        config,
        [item] * requests,
        mode=mode,
        workload=f"{requests} x {context}",
        seed=given.seed,
        limit_s=given.seconds,
    )
    busy_s = row.link_busy_share * row.duration_s
    link = row.streamed_bytes / busy_s if busy_s else 0.0
    return LongRow(
        **msgspec.structs.asdict(row),
        context_tokens=context,
        kv_factor=context * token_bytes / row.kv_bytes,
        prompt_tokens_per_s=item.prompt_tokens / row.ttft_p50_s if row.ttft_p50_s else 0.0,
        decode_bound_s=decode_bound_s(
            shape, gpu_named(given.card).hbm_bytes_per_s, context, row.kv_bytes, link
        ),
        link_bytes_per_s=link,
    )


def config_of(
    given: argparse.Namespace, requests: int, mode: str, *, kv_bytes: int, context: int
) -> EngineConfig:
    """An engine whose memories hold all requests: the device's alone, or with the pool."""
    longest = context + (SPARE_SLOTS + 1) * 16
    fields: dict[str, Any] = {"max_model_len": context}
    if mode == "resident":
        shape = shape_named(given.model, option="--model")
        token_bytes = shape.token_layer_kv_bytes * shape.num_layers
        kv_bytes = (requests * longest + WARM_UP_BLOCKS * 16) * token_bytes
        fields["host_pool_bytes"] = 0
    return engine_config(given, kv_bytes, **fields)


def decode_bound_s(
    shape: ModelShape, hbm_bytes_per_s: float, context: int, kv_bytes: int, link: float
) -> float:
    """Least time in which one sequence decodes a token.

    Args:
        context: its tokens.
        kv_bytes: of the device; what does not fit is streamed.
        link: bytes/s; 0: nothing is streamed.
    """
    in_all = context * shape.token_layer_kv_bytes * shape.num_layers
    streamed = max(0, in_all - kv_bytes)
    hbm_s = (shape.weight_bytes + in_all + streamed) / hbm_bytes_per_s
    return max(hbm_s, streamed / link) if link else hbm_s


def draw(figure: Any, rows: Sequence[LongRow]) -> None:
    """Time to the first token and of each further one, a group of bars per number of requests."""
    first, further = figure.subplots(1, 2)
    names = [f"{row.sent} {row.mode}" for row in rows]
    first.bar(names, [row.ttft_p50_s for row in rows], color="0.6")
    first.set_ylabel("time to first token, s (median)")
    further.bar(names, [row.tpot_p50_s for row in rows], color="0.6")
    bounds = [row.decode_bound_s for row in rows]
    further.plot(names, bounds, "k_", markersize=24, label="bound of one alone")
    further.set_ylabel("time of an output token, s (median)")
    further.legend()
    figure.suptitle(f"{rows[0].model}, {rows[0].context_tokens} tokens each")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, name="long_context")
    parser.set_defaults(model="llama-3.1-8b", host_pool="96GiB")
    add = parser.add_argument
    add("--kv", default="2GiB")
    add("--times", type=float, default=4.0, help="the device's KV memory, per request")
    add("--requests", type=int, nargs="+", default=[1, 8])
    add("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    add("--output", type=int, default=64, help="tokens")
    add("--card", default="h200", help="whose memory's rate the bound takes")
    add("--seconds", type=float, help="cut a run off")
    add_budget(parser)
    return parser


if __name__ == "__main__":
    main()
