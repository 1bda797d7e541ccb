"""`scripts/bench_kernels`: checks each kernel against its reference, then times it."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pie_async.cuda.errors import require_cuda
from pie_async.errors import ConfigError
from scripts._bench_kernels.timing import Case, Row, measure, show, write

KERNELS = ("attention", "linear", "elementwise")


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if a kernel differs from its reference; 2 without a usable GPU."""
    given = _parse(arguments)
    try:
        require_cuda()
    except ConfigError as error:
        print(f"scripts/bench_kernels: {error}", file=sys.stderr)
        return 2
    from pie_async.cuda.tuning import this_machine

    now = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
    rows: list[Row] = []
    with torch.inference_mode():
        for case in _cases(given):
            rows.append(measure(case, replays=3 if given.quick else 9))
            if given.out is not None:
                write(given.out, rows, machine=this_machine(), date=now)
    show(rows, title=f"{this_machine()}, {now}")
    return int(any(row.is_wrong for row in rows))


def _cases(given: argparse.Namespace) -> Iterator[Case]:
    # These import Triton, which `require_cuda` has found by now.
    from scripts._bench_kernels import attention, elementwise, linear

    device = torch.device("cuda")
    wanted = KERNELS if given.kernels is None else (given.kernels,)
    if "attention" in wanted:
        yield from attention.cases(device, sweep=given.sweep, quick=given.quick)
    if "linear" in wanted:
        yield from linear.cases(device, quick=given.quick)
    if "elementwise" in wanted:
        yield from elementwise.cases(device, quick=given.quick)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench_kernels", description=__doc__)
    add = parser.add_argument
    add("kernels", nargs="?", choices=KERNELS, help="which; all by default")
    add("--sweep", action="store_true", help="attention in other configurations too")
    add("--quick", action="store_true", help="few shapes, few replays")
    add("--out", type=Path, metavar="FILE", help="write JSON, again after every row")
    given = parser.parse_args(arguments)
    if given.sweep and given.kernels in ("linear", "elementwise"):
        parser.error("--sweep is for attention")
    return given


if __name__ == "__main__":
    sys.exit(main())
