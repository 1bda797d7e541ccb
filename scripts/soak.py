"""Random loads on the simulated device, checked, one seed after the other.

    python scripts/soak.py --seeds 0:1000
    python scripts/soak.py --requests 100000

Each seed draws memories, options and requests; the engine runs them with the happens-before
checker and the invariants on, and must give the tokens of a run in which everything fits and
nothing is shared, and hold no block afterwards but cached ones. A failing seed is printed with
the command that replays it. With `--requests`, so many go through one engine, whose clients leave
and stop reading at random: every block, slot, stream and chunk of pinned memory must come back.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._soak.many_requests import run_many
from tests.support.soak import Scenario, SoakFailed, compare

COUNTED = (
    "preemptions_parked",
    "preemptions_recomputed",
    "demotions",
    "promotions",
    "prefix_query_tokens",
    "prefix_hit_tokens",
    "cache_evictions",
)


def main() -> int:
    """Run the seeds; the number of failures decides the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:200", metavar="A:B", help="first and one past last")
    parser.add_argument("--requests", type=int, default=0, metavar="N", help="one engine instead")
    arguments = parser.parse_args()
    if arguments.requests:
        print(run_many(arguments.requests, seed=0).tell())
        return 0
    return _run_seeds(*map(int, arguments.seeds.split(":")))


def _run_seeds(first: int, last: int) -> int:
    began_s = time.perf_counter()
    totals: Counter[str] = Counter()
    failed = []
    for seed in range(first, last):
        try:
            stats = compare(Scenario.of(seed)).stats
        except SoakFailed as failure:
            failed.append(seed)
            print(failure, file=sys.stderr)
            if last - first == 1:
                raise
        else:
            totals.update({name: getattr(stats, name) for name in COUNTED})
    counts = ", ".join(f"{totals[name]} {name.replace('_', ' ')}" for name in COUNTED)
    print(
        f"{last - first - len(failed)} of {last - first} seeds passed in "
        f"{time.perf_counter() - began_s:.1f} s: {counts}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
