"""The requests of the rows, the same for every engine."""

from __future__ import annotations

import msgspec

from pie_async.workload import WorkItem, arrive_at_rate, clip, read_trace
from scripts._bench_gpu.options import Options

FEWEST_AT_RATE = 20


def equal(options: Options, batch: int, prompt: int, output: int) -> list[WorkItem]:
    """A batch of equal requests."""
    item = WorkItem(
        prompt_tokens=options.scaled(prompt), output_tokens=max(2, options.scaled(output))
    )
    return [item] * options.scaled(batch)


def at_once(options: Options) -> list[WorkItem]:
    """As many requests of the trace as are asked for."""
    return _from_trace(options, options.scaled(options.requests))


def _from_trace(options: Options, count: int) -> list[WorkItem]:
    assert options.trace is not None
    return [
        msgspec.structs.replace(clip(_scaled(options, item), options.context_tokens), arrival_s=0.0)
        for item in read_trace(options.trace, limit=count)
    ]


def _scaled(options: Options, item: WorkItem) -> WorkItem:
    return WorkItem(
        prompt_tokens=options.scaled(item.prompt_tokens),
        output_tokens=options.scaled(item.output_tokens),
    )


def at_rate(options: Options, requests_per_s: float, *, count: int | None = None) -> list[WorkItem]:
    """As many of the trace as arrive within the row's time, as a Poisson process.

    Args:
        count: so many instead.
    """
    count = count or max(FEWEST_AT_RATE, round(requests_per_s * options.seconds))
    return arrive_at_rate(_from_trace(options, count), requests_per_s=requests_per_s, seed=1)
