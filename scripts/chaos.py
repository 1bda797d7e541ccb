"""The whole engine on the simulated device, everything that may vary drawn from one seed.

    scripts/chaos --seeds 10000
    scripts/chaos --seeds 500:600
    scripts/chaos --seed 4711
    scripts/chaos --api --seeds 1000

A seed draws memories, options, requests and their clients' manners (slow, cancelling, vanishing,
never reading), message delays, kernel and copy times, host memory that comes late or is refused,
copies that fail or arrive corrupted, actors that raise, devices that are lost, and which of the
ready tasks runs next. Each run has the happens-before checker and the invariants
on; its tokens must be those of the seed, and everything must be returned. A failing seed prints
the command that replays it; with --seed the digest of its story is printed, which is the same
every time. With --api the clients of a seed speak OpenAI's dialect, down to bytes.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.chaos import Chaos, describe
from tests.support.chaos_run import ChaosFailed, Outcome, run

COUNTED = (
    "iterations",
    "preemptions_parked",
    "preemptions_recomputed",
    "demotions",
    "promotions",
    "prefix_hit_tokens",
    "cache_evictions",
    "sequences_cancelled",
    "copy_attempts_failed",
    "copies_lost",
    "sequences_begun_anew",
    "sequences_lost",
)


def main() -> int:
    """Run the seeds; any failure makes the exit code 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seeds", type=_seeds, metavar="N or A:B", help="0..N-1, or A..B-1")
    which.add_argument("--seed", type=int, help="one seed, with what it drew")
    parser.add_argument("--api", action="store_true", help="clients in OpenAI's dialect")
    chosen = parser.parse_args()
    logging.getLogger("pie_async").setLevel(logging.CRITICAL)  # a failure tells its own story
    if chosen.seeds is None:
        return _replay(chosen.seed, through_api=chosen.api)
    return _run_all(chosen.seeds, through_api=chosen.api)


def _seeds(text: str) -> range:
    first, _, last = text.rpartition(":")
    return range(int(first or 0), int(last))


def _replay(seed: int, *, through_api: bool) -> int:
    print(describe(Chaos.of(seed)))
    try:
        outcome = run(seed, through_api=through_api)
    except ChaosFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    print(f"ended: {outcome.endings}; {outcome.messages} messages, story {outcome.digest}")
    return 0


def _run_all(seeds: range, *, through_api: bool) -> int:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    outcomes, failed = _Totals(), []
    began_s = time.perf_counter()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("seeds", total=len(seeds))
        for seed in seeds:
            try:
                outcomes.add(run(seed, through_api=through_api))
            except ChaosFailed as failure:
                failed.append(seed)
                console.print(str(failure), markup=False, highlight=False)
            progress.update(task, advance=1, description=f"seeds ({len(failed)} failed)")
    wall_s = time.perf_counter() - began_s
    print(f"{len(seeds) - len(failed)} of {len(seeds)} seeds clean in {wall_s:.1f} s")
    print(outcomes.tell(wall_s))
    for seed in failed:
        print(f"failed: scripts/chaos {'--api ' if through_api else ''}--seed {seed}")
    return 1 if failed else 0


class _Totals:
    """Sums over seeds."""

    def __init__(self) -> None:
        self._virtual_s = 0.0
        self._messages = 0
        self._counts: Counter[str] = Counter()
        self._endings: Counter[str] = Counter()
        self._bites: Counter[str] = Counter()

    def add(self, outcome: Outcome) -> None:
        self._virtual_s += outcome.virtual_s
        self._messages += outcome.messages
        self._counts.update({name: getattr(outcome.stats, name) for name in COUNTED})
        self._endings.update(outcome.endings)
        self._bites.update(outcome.bites)

    def tell(self, wall_s: float) -> str:
        counts = ", ".join(f"{self._counts[name]} {name.replace('_', ' ')}" for name in COUNTED)
        return (
            f"{self._virtual_s / 3600:.2f} simulated hours (clients' pauses included), "
            f"{self._virtual_s / 3600 / wall_s:.4f} per second; {self._messages} messages\n"
            f"{counts}\noutputs ended: {dict(self._endings.most_common())}\n"
            f"faults that bit: {dict(self._bites.most_common())}"
        )


if __name__ == "__main__":
    sys.exit(main())
