"""What pooling gains on cards that are not here, on the simulated device (Pie, section 6.1).

    python -m scripts.paper.gpus

Every card runs a shape whose weights fit it, with KV memory that is left beside them, saturated
by requests that are all there at once. Predictions: docs/evaluation.md says how far the
simulator is from an H200.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import msgspec

from pie_async.config import parse_size
from pie_async.device.cost_model import gpu_named, link_named, pooling_bound, shape_named
from scripts.paper.load import Row, measure
from scripts.paper.options import MODES, add_context, engine_config, loop_of, parser_of, requests_of
from scripts.paper.progress import Progress
from scripts.paper.results import Results, replot

CARD_SHARE = 0.95
"""Of a card's memory: what weights and KV may take; the rest is for everything else."""


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU, its way to the pool, and a shape that suits it."""

    gpu: str
    link: str
    model: str
    kv: tuple[str, ...]


QWEN_KV = ("2GiB", "4GiB", "7GiB", "12GiB")
CARDS: dict[str, Card] = {
    "h200": Card(gpu="h200", link="pcie5", model="qwen2.5-32b", kv=QWEN_KV),
    "h200-peer": Card(gpu="h200", link="nvlink", model="qwen2.5-32b", kv=QWEN_KV),
    "h100": Card(gpu="h100", link="pcie5", model="qwen2.5-32b", kv=QWEN_KV),
    "gh200": Card(gpu="gh200", link="nvlink-c2c", model="qwen2.5-32b", kv=QWEN_KV),
    # The processor's link to both GPUs of a superchip is each one's own, as wide as GH200's.
    "gb200": Card(gpu="b200", link="nvlink-c2c", model="llama-3.1-70b", kv=("4GiB", "12GiB")),
    "rtx4090": Card(gpu="rtx4090", link="pcie4", model="llama-3.1-8b", kv=("1GiB", "2GiB", "4GiB")),
}


class CardRow(Row, frozen=True, kw_only=True):
    """One card, one size, one mode."""

    card: str
    link: str
    gain: float
    """Throughput over that of the first mode."""
    gain_bound: float
    """What streaming can bring a decode iteration on the roofline (`pooling_bound`)."""
    engine_bound: float
    """The same where weights and KV are read as slowly as the first mode's iterations were: longer
    iterations hide more."""


def main() -> None:
    """Run every card, or draw what was simulated."""
    given = _parser().parse_args()
    if given.plot_only:
        replot(given.name, given.results, CardRow, draw)
        return
    given.device = "sim"
    results = Results(given.name, given.results, {"seed": given.seed, "settings": given.set}, draw)
    with loop_of(given) as runner:
        progress = Progress(len(given.cards))
        for name in given.cards:
            progress.begin(name)
            card = CARDS[name]
            for kv in given.kv or card.kv:
                first: Row | None = None
                for mode in given.modes:
                    row = runner.run(_run(given, card, parse_size(kv, option="--kv"), mode))
                    first = first or row
                    results.add(_card_row(name, card, row, first))
    results.finish()


def _card_row(name: str, card: Card, row: Row, first: Row) -> CardRow:
    kv_bytes = row.kv_bytes
    resident_bytes = shape_named(card.model).weight_bytes + kv_bytes
    reached = resident_bytes / first.mean_iteration_s
    return CardRow(
        **msgspec.structs.asdict(row),
        card=name,
        link=card.link,
        gain=row.steady_tokens_per_s / max(first.steady_tokens_per_s, 1e-9),
        gain_bound=bound_of(card, kv_bytes, gpu_named(card.gpu).hbm_bytes_per_s),
        engine_bound=bound_of(card, kv_bytes, reached),
    )


async def _run(given: argparse.Namespace, card: Card, kv_bytes: int, mode: str) -> Row:
    fields = {**MODES[mode], "model": card.model, "sim_gpu": card.gpu, "sim_link": card.link}
    return await measure(
        engine_config(given, kv_bytes, **fields),
        requests_of(given, given.workload, given.requests),
        mode=mode,
        workload=given.workload,
        seed=given.seed,
        limit_s=given.seconds,
    )


def bound_of(card: Card, kv_bytes: int, hbm_bytes_per_s: float) -> float:
    """Most that streaming brings a decode iteration that reads memory at this rate."""
    weight_bytes = shape_named(card.model).weight_bytes
    rate = link_named(card.link).bytes_per_s / hbm_bytes_per_s
    return pooling_bound(weight_bytes, kv_bytes, rate).throughput_gain


def fits(card: Card) -> bool:
    """Whether weights and the most KV are within `CARD_SHARE` of the card."""
    most_kv = max(parse_size(kv, option="--kv") for kv in card.kv)
    needed = shape_named(card.model).weight_bytes + most_kv
    return needed <= CARD_SHARE * gpu_named(card.gpu).memory_bytes


def draw(figure: Any, rows: Sequence[CardRow]) -> None:
    """Gain of pie over KV memory, a line per card, dashed what the link allows."""
    axes = figure.subplots()
    for card in dict.fromkeys(row.card for row in rows):
        line = [row for row in rows if (row.card, row.mode) == (card, "pie")]
        sizes = [row.kv_bytes / 2**30 for row in line]
        (drawn,) = axes.plot(sizes, [row.gain for row in line], "o-", label=card)
        bounds = [row.engine_bound for row in line]
        axes.plot(sizes, bounds, "--", color=drawn.get_color(), alpha=0.5)
    axes.set_xlabel("KV memory on the device, GiB")
    axes.set_ylabel("throughput of pie / off, simulated (dashed: the bound)")
    axes.grid(alpha=0.3)
    axes.legend()


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, name="gpus")
    add_context(parser)
    add = parser.add_argument
    add("--cards", nargs="+", default=list(CARDS), choices=list(CARDS))
    add("--kv", nargs="+", help="instead of each card's own sizes")
    add("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    add("--workload", default="sharegpt-like", help="or an Azure trace's CSV file")
    add("--requests", type=int, default=800)
    add("--seconds", type=float, help="cut a run off; the modes then answer different requests")
    return parser


if __name__ == "__main__":
    main()
