"""One load, iteration by iteration: what the governor allowed, what was streamed, who stalled.

    python -m scripts.paper.iterations --kv 4GiB --requests 700 --until 0.8
    python -m scripts.paper.iterations --device sim --set 'sim_link="nvlink"' --requests 700

Where throughput is short of what a fixed setting reaches, this shows when and why. A row is an
iteration; the summary adds up those with and without prompts, with and without streamed blocks.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from pie_async.config import parse_size
from pie_async.messages import IterationObserved, SetStreamedLimit
from pie_async.story import Entry
from scripts.paper.load import Row, measure_on, running
from scripts.paper.options import add_context, engine_config, loop_of, parser_of, requests_of
from scripts.paper.results import Results, replot


class Iteration(msgspec.Struct, frozen=True, kw_only=True):
    """One iteration, and what might be streamed when it had run."""

    at_s: float
    """Since the first one."""
    compute_s: float
    stall_s: float
    staged_bytes: int
    staging_busy_s: float
    decode_rows: int
    prefill_tokens: int
    resident_blocks: int
    streamed_blocks: int
    wanted_blocks: int
    limit_blocks: int
    cause: str

    @property
    def kind(self) -> str:
        """What the summary counts it as."""
        work = "with prompts" if self.prefill_tokens else "decoding alone"
        return f"{work}, {'staged' if self.staged_bytes else 'resident'}"


def main() -> None:
    """Run the load, or draw what was measured."""
    given = _parser().parse_args()
    if given.plot_only:
        replot(given.name, given.results, Iteration, draw)
        return
    with loop_of(given) as runner:
        row, iterations = runner.run(_run(given))
    facts = {"seed": given.seed, "settings": given.set, "load": msgspec.to_builtins(row)}
    results = Results(given.name, given.results, facts, draw)
    results.add_all(iterations)
    print(
        f"{row.steady_tokens_per_s:.0f} tokens/s, stall {row.stall_share:.2%}, "
        f"{row.preemptions_parked} parked, longest gap {row.longest_gap_s:.1f} s"
    )
    for line in summary(iterations):
        print(line)
    results.finish()


async def _run(given: argparse.Namespace) -> tuple[Row, list[Iteration]]:
    config = engine_config(given, parse_size(given.kv, option="--kv"))
    items = requests_of(given, given.workload, given.requests, rate=given.rate)
    async with running(config) as engine:
        story = engine.story
        assert story is not None, "a running engine keeps one"
        story.keep_all()
        warmed_up = len(story)
        row = await measure_on(
            engine,
            items,
            mode="pie",
            workload=given.workload,
            requests_per_s=given.rate or 0.0,
            seed=given.seed,
            limit_s=given.seconds,
            until=given.until,
        )
        return row, iterations_of(itertools.islice(story, warmed_up, None))


def iterations_of(story: Iterable[Entry]) -> list[Iteration]:
    """The iterations that a story tells of."""
    found: list[Iteration] = []
    limit_blocks, cause, began_s = 0, "idle", None
    for entry in story:
        match entry.message:
            case SetStreamedLimit(limit_blocks=limit_blocks, cause=cause):
                pass
            case IterationObserved() as seen:
                began_s = entry.at_s if began_s is None else began_s
                found.append(
                    Iteration(
                        at_s=entry.at_s - began_s,
                        limit_blocks=limit_blocks,
                        cause=cause,
                        **{name: getattr(seen, name) for name in _SEEN},
                    )
                )
            case _:
                pass
    return found


_SEEN = (
    "compute_s", "stall_s", "staged_bytes", "staging_busy_s", "decode_rows", "prefill_tokens",
    "resident_blocks", "streamed_blocks", "wanted_blocks",
)  # fmt: skip


def summary(iterations: Sequence[Iteration]) -> Iterator[str]:
    """A line for each kind of iteration, and how often what ended a limit's growth."""
    kinds: defaultdict[str, list[Iteration]] = defaultdict(list)
    for each in iterations:
        kinds[each.kind].append(each)
    for kind, some in sorted(kinds.items()):
        seconds = sum(each.compute_s for each in some)
        stall_s = sum(each.stall_s for each in some)
        yield (
            f"{kind}: {len(some)} iterations of {1e3 * seconds / len(some):.1f} ms with "
            f"{sum(each.decode_rows for each in some) / len(some):.0f} rows that decode, "
            f"{stall_s:.2f} s stall ({stall_s / (seconds + stall_s):.2%})"
        )
    pairs = itertools.pairwise(iterations)
    cuts = sum(now.cause == "stall" and now.limit_blocks < last.limit_blocks for last, now in pairs)
    yield f"limit cut for stall {cuts} times"


def draw(figure: Any, rows: Sequence[Iteration]) -> None:
    """Blocks, times and rows over time."""
    blocks, times, batch = figure.subplots(3, 1, sharex=True)
    at_s = [row.at_s for row in rows]
    blocks.plot(at_s, [row.limit_blocks for row in rows], label="may be streamed")
    blocks.plot(at_s, [row.streamed_blocks for row in rows], label="streamed")
    blocks.set_ylabel("blocks")
    times.plot(at_s, [1e3 * row.compute_s for row in rows], ".", ms=2, label="compute")
    times.plot(at_s, [1e3 * row.staging_busy_s for row in rows], ".", ms=2, label="link busy")
    times.plot(at_s, [1e3 * row.stall_s for row in rows], ".", ms=2, label="stall")
    times.set_ylabel("ms")
    batch.plot(at_s, [row.decode_rows for row in rows], label="sequences that decode")
    batch.set_xlabel("s")
    for axes in (blocks, times, batch):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, name="iterations")
    add_context(parser)
    add = parser.add_argument
    add("--kv", default="4GiB")
    add("--workload", default="sharegpt-like", help="or an Azure trace's CSV file")
    add("--requests", type=int, default=700)
    add("--rate", type=float, help="requests/s; default: all at once")
    add("--seconds", type=float, help="cut the run off")
    add("--until", type=float, default=1.0, help="cut off at this share of the asked output")
    return parser


if __name__ == "__main__":
    main()
