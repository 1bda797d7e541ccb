"""Adaptivity: the governor against every fixed setting while the load changes (Pie, section 6.4).

    python -m scripts.paper.adaptivity --device sim --link nvlink

One engine goes through four phases: few requests (warm-up), many more than it can answer, long
prompts, and few again. Requests that still wait when a phase ends are withdrawn, those under way
go on, but throughput is that of the requests that came in the phase. First every fixed number of
streamed blocks is run, from 0 to --most, then the governor. The oracle is the best fixed setting
of each phase, chosen afterwards. What counts is the time from --settling iterations after the
change to the phase's end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from pie_async import Engine
from pie_async.config import EngineConfig, parse_size
from pie_async.device.cost_model import (
    PoolingBound,
    gpu_named,
    link_named,
    pooling_bound,
    shape_named,
)
from scripts.paper.load import Engines
from scripts.paper.options import add_context, engine_config, loop_of, parser_of
from scripts.paper.phases import LONG_PROMPTS, SHORT, Phase, PhaseSeen, Seen, run_phases
from scripts.paper.progress import Progress
from scripts.paper.results import Results, replot

MOST_OF_BOUND = 1.6
"""Where fixed settings end, unless told, in bounds of what hides behind decoding. Beside prompts
more does, and the best setting has to lie inside."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One setting in one phase, over all seeds."""

    model: str
    link: str
    kv_bytes: int
    phase: str
    is_governor: bool
    setting_blocks: int
    """Fixed; of the governor: what its limit was at the end, on the average."""
    bound_blocks: int
    """What hides behind a decode iteration at the speed that kernels reach."""
    early_blocks: int
    """What might be streamed when the phase counted as settled."""
    tokens_per_s: float
    """Once settled."""
    gain: float
    """Throughput over that with nothing streamed."""
    gain_bound: float
    """The most that streaming brings decoding, by `pooling_bound`."""
    oracle_tokens_per_s: float
    """Of the best fixed setting, once settled; 0 beside fixed settings."""
    oracle_blocks: int
    ratio: float
    """Throughput over the oracle's."""
    stall_share: float
    """Once settled."""
    changing_stall_share: float
    link_busy_share: float
    mean_streamed_blocks: float
    mean_iteration_s: float


Run = list[PhaseSeen]


def main() -> None:
    """Run every setting, or draw what was measured."""
    parser = _parser()
    given = parser.parse_args()
    if given.plot_only:
        replot(given.name, given.results, Point, draw)
        return
    if given.steps < 1:
        parser.error("--steps: the governor needs one fixed setting above 0 beside it, or more")
    named = ("gpu", "link", "rates", "seconds", "settling", "seed", "seeds", "set")
    results = Results(
        given.name, given.results, {name: getattr(given, name) for name in named}, draw
    )
    with loop_of(given) as runner:
        engines = Engines(runner)

        def run(blocks: int | None, seed: int) -> Run:
            engine = engines.of(_config(given, is_fixed=blocks is not None))
            return runner.run(_run(given, engine, blocks, seed))

        _measure(given, results.add, run)
        engines.close()
    results.finish()


def _measure(
    given: argparse.Namespace, add: Callable[[Point], None], run: Callable[[int | None, int], Run]
) -> None:
    """All fixed settings, then the governor beside the best of them."""
    bound = _bound(given)
    most = given.most or round(MOST_OF_BOUND * bound.streamed_bytes / _block_bytes(given))
    settings = sorted({round(most * step / given.steps) for step in range(given.steps + 1)})
    fixed: dict[int, Run] = {}
    progress = Progress(len(settings) + 1)
    for blocks in (*settings, None):
        progress.begin("the governor" if blocks is None else f"{blocks} blocks")
        runs = [run(blocks, given.seed + number) for number in range(given.seeds)]
        together = [_together(phase) for phase in zip(*runs, strict=True)]
        if blocks is not None:
            fixed[blocks] = together
        for index, phase in enumerate(phases_of(given)):
            add(_point(given, phase.name, blocks, bound, together[index], fixed, index))


def _point(
    given: argparse.Namespace,
    phase: str,
    blocks: int | None,
    bound: PoolingBound,
    seen: PhaseSeen,
    fixed: dict[int, Run],
    index: int,
) -> Point:
    settled = seen.settled
    none = fixed[0][index].settled.tokens_per_s
    oracle_blocks, oracle = 0, 0.0
    if blocks is None:
        oracle_blocks = max(fixed, key=lambda each: fixed[each][index].settled.tokens_per_s)
        oracle = fixed[oracle_blocks][index].settled.tokens_per_s
    return Point(
        model=given.model,
        link=given.link,
        kv_bytes=parse_size(given.kv, option="--kv"),
        phase=phase,
        is_governor=blocks is None,
        setting_blocks=seen.limit_blocks,
        bound_blocks=int(bound.streamed_bytes / _block_bytes(given)),
        early_blocks=seen.early_limit_blocks,
        tokens_per_s=settled.tokens_per_s,
        gain=settled.tokens_per_s / none if none else 0.0,
        gain_bound=bound.throughput_gain,
        oracle_tokens_per_s=oracle,
        oracle_blocks=oracle_blocks,
        ratio=settled.tokens_per_s / oracle if oracle else 0.0,
        stall_share=settled.stall_share,
        changing_stall_share=seen.changing.stall_share,
        link_busy_share=settled.h2d_busy_s / settled.seconds,
        mean_streamed_blocks=settled.streamed_block_s / settled.seconds,
        mean_iteration_s=(settled.compute_s + settled.stall_s) / max(1, settled.iterations),
    )


def _together(seen: Sequence[PhaseSeen]) -> PhaseSeen:
    """One phase's runs with different seeds as one."""
    return PhaseSeen(
        changing=sum((each.changing for each in seen), Seen()),
        settled=sum((each.settled for each in seen), Seen()),
        early_limit_blocks=round(sum(each.early_limit_blocks for each in seen) / len(seen)),
        limit_blocks=round(sum(each.limit_blocks for each in seen) / len(seen)),
    )


def _config(given: argparse.Namespace, *, is_fixed: bool) -> EngineConfig:
    fields: dict[str, Any] = {"streamed_blocks": 0 if is_fixed else None}
    if given.device == "sim":
        fields |= {"sim_gpu": given.gpu, "sim_link": given.link}
    return engine_config(given, parse_size(given.kv, option="--kv"), **fields)


async def _run(given: argparse.Namespace, engine: Engine, blocks: int | None, seed: int) -> Run:
    """All phases with one setting."""
    if blocks is not None:
        await engine.fix_streaming(blocks)
    return await run_phases(
        engine,
        phases_of(given),
        seconds=given.seconds,
        settling=given.settling,
        context=given.context,
        seed=seed,
    )


def phases_of(given: argparse.Namespace) -> list[Phase]:
    """The four, in order."""
    low, high, long = given.rates
    return [
        Phase(name="warm-up", lengths=SHORT, requests_per_s=low),
        Phase(name="rate up", lengths=SHORT, requests_per_s=high),
        Phase(name="long prompts", lengths=LONG_PROMPTS, requests_per_s=long),
        Phase(name="back down", lengths=SHORT, requests_per_s=low),
    ]


def _bound(given: argparse.Namespace) -> PoolingBound:
    """What hides behind decoding at the speed that kernels reach, and what it brings."""
    gpu, shape = gpu_named(given.gpu), shape_named(given.model)
    rate = link_named(given.link).bytes_per_s / (gpu.efficiency * gpu.hbm_bytes_per_s)
    return pooling_bound(shape.weight_bytes, parse_size(given.kv, option="--kv"), rate)


def _block_bytes(given: argparse.Namespace) -> int:
    shape = shape_named(given.model)
    config = engine_config(given, parse_size(given.kv, option="--kv"))
    return shape.num_layers * shape.token_layer_kv_bytes * config.block_tokens


def draw(figure: Any, points: Sequence[Point]) -> None:
    """Throughput over the fixed setting, a panel per phase; the governor's as a line."""
    phases = list(dict.fromkeys(point.phase for point in points))
    panels = figure.subplots(1, len(phases), squeeze=False)[0]
    for axes, phase in zip(panels, phases, strict=True):
        here = [point for point in points if point.phase == phase]
        fixed = [point for point in here if not point.is_governor]
        blocks = [point.setting_blocks for point in fixed]
        axes.plot(blocks, [point.tokens_per_s for point in fixed], "o-", label="fixed")
        for point in here:
            if point.is_governor:
                axes.axhline(point.tokens_per_s, color="tab:orange", label="governor")
                axes.axhline(
                    0.97 * point.oracle_tokens_per_s, color="gray", ls="--", label="97 % of best"
                )
        axes.set_title(phase)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.supxlabel("blocks that may be streamed")
    panels[0].set_ylabel("output tokens/s, settled")
    panels[0].legend()


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, name="adaptivity")
    add_context(parser)
    add = parser.add_argument
    add("--gpu", default="h200", help="of the bound, and what is simulated")
    add("--link", default="pcie5", help="the way to the pool; of the bound, and simulated")
    add("--kv", default="4GiB")
    add("--rates", type=float, nargs=3, default=[2.0, 32.0, 12.0], help="low, high, long prompts")
    add("--seconds", type=float, default=60.0, help="of a phase")
    add("--settling", type=int, default=100, help="iterations after a change")
    add("--steps", type=int, default=8, help="fixed settings above 0")
    add("--most", type=int, help="blocks of the last of them; default: 1.6 times the bound")
    add("--seeds", type=int, default=1, help="runs of every setting, taken together")
    return parser


if __name__ == "__main__":
    main()
