"""What each part of pooling is worth: one thing changed at a time, the load the same.

    python -m scripts.paper.ablations --kv 4GiB

Everything is there at once and more than fits. `base` is the engine as it is. Then: CUDA graphs
off (`graphs`), the staging ring's depth and the layers of a group (`ring`, `group`), no copy
issued for an iteration before the one before it has ended (`prefetch`: one iteration in flight
instead of two), the paper's exchange, which copies what was staged back to the pool in every
iteration (`exchange`), a fixed number of streamed blocks instead of the governor (`static`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from pie_async.config import parse_size
from scripts.paper.load import Row, measure
from scripts.paper.options import add_context, engine_config, loop_of, parser_of, requests_of
from scripts.paper.progress import Progress
from scripts.paper.results import Results, replot

PARTS = ("graphs", "ring", "group", "prefetch", "exchange", "static")


class Variant(msgspec.Struct, frozen=True):
    """One thing changed."""

    part: str
    value: str
    fields: dict[str, Any]


class Ablation(Row, frozen=True, kw_only=True):
    """The load with one thing changed."""

    part: str
    value: str
    of_base: float
    """Throughput over that of `base`."""


def main() -> None:
    """Run every variant, or draw what was measured."""
    given = _parser().parse_args()
    if given.plot_only:
        replot(given.name, given.results, Ablation, draw)
        return
    facts = {"seed": given.seed, "settings": given.set}
    results = Results(given.name, given.results, facts, draw)
    variants = list(variants_of(given))
    base = 0.0
    with loop_of(given) as runner:
        progress = Progress(len(variants))
        for variant in variants:
            progress.begin(f"{variant.part} {variant.value}")
            row = runner.run(_run(given, variant))
            base = base or row.steady_tokens_per_s
            results.add(
                Ablation(
                    **msgspec.structs.asdict(row),
                    part=variant.part,
                    value=variant.value,
                    of_base=row.steady_tokens_per_s / base if base else 0.0,
                )
            )
    results.finish()


def variants_of(given: argparse.Namespace) -> Iterator[Variant]:
    """`base` first; graphs are the CUDA device's alone."""
    yield Variant("base", "", {})
    if "graphs" in given.parts and given.device == "cuda":
        yield Variant("graphs", "off", {"cuda_graphs": False})
    if "ring" in given.parts:
        yield from (Variant("ring", str(depth), {"ring_depth": depth}) for depth in given.ring)
    if "group" in given.parts:
        yield from (Variant("group", str(size), {"layer_group": size}) for size in given.group)
    if "prefetch" in given.parts:
        yield Variant("prefetch", "off", {"iterations_in_flight": 1})
    if "exchange" in given.parts:
        # What is on its way out takes a ring buffer, too.
        for depth in (given.base_ring, 2 * given.base_ring):
            yield Variant("exchange", f"ring {depth}", {"exchange": True, "ring_depth": depth})
    if "static" in given.parts:
        yield from (Variant("static", str(n), {"streamed_blocks": n}) for n in given.static)


async def _run(given: argparse.Namespace, variant: Variant) -> Row:
    # The simulator's own default, layer by layer, is no GPU's: take what the CUDA device takes.
    groups = {"layer_group": given.base_group, "ring_depth": given.base_ring}
    return await measure(
        engine_config(given, parse_size(given.kv, option="--kv"), **{**groups, **variant.fields}),
        requests_of(given, given.workload, given.requests),
        mode=f"{variant.part} {variant.value}".strip(),
        workload=given.workload,
        seed=given.seed,
        limit_s=given.seconds,
    )


def draw(figure: Any, rows: Sequence[Ablation]) -> None:
    """Throughput of each variant beside that of `base`."""
    axes = figure.subplots()
    names = [row.mode for row in rows]
    axes.barh(names, [row.of_base for row in rows], color="0.6")
    axes.axvline(1.0, color="0.2", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(f"throughput / the engine's as it is ({rows[0].steady_tokens_per_s:.0f}/s)")
    axes.set_title(f"{rows[0].model}, {rows[0].workload}, {rows[0].kv_bytes / 2**30:g} GiB of KV")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, name="ablations")
    add_context(parser)
    add = parser.add_argument
    add("--kv", default="4GiB")
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    add("--base-ring", type=int, default=2)
    add("--base-group", type=int, default=8)
    add("--ring", nargs="+", type=int, default=[3, 4])
    add("--group", nargs="+", type=int, default=[1, 2, 4, 16], help="layers")
    add("--static", nargs="+", type=int, default=[0, 50, 100, 150, 200, 250, 300], help="blocks")
    add("--workload", default="sharegpt-like", help="or an Azure trace's CSV file")
    add("--requests", type=int, default=800)
    add("--seconds", type=float, help="cut a run off; variants then answer different requests")
    return parser


if __name__ == "__main__":
    main()
