"""Garbage collection beside a loop that must not be held up."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NoReturn

YOUNG_OBJECTS = 20_000
"""New objects after which garbage is looked for. Python's 700 come several times an iteration with
a thousand streams, and none of them is garbage: looking took a tenth of a server's time."""

TIDY_EVERY_S = 60.0
SWEEP_EVERY_S = 600.0
SWEEP_SHARE = 1e-4
"""The most of the time that sweeping takes."""


def settle() -> None:
    """What is loaded by now stays: collections need not go through it, nor come often. Unless it is
    set aside, a full one stops the loop: 0.15 s, measured beside 256 running sequences."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


@contextmanager
def settled() -> Iterator[None]:
    """`settle`, until the block ends."""
    before = gc.get_threshold()
    settle()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@asynccontextmanager
async def tidied() -> AsyncIterator[None]:
    """Inside, free lists are emptied once a minute, and now and then all garbage is collected.

    A server that makes no cycles hardly ever has so many new objects that Python looks at all of
    them. Then nothing empties its free lists, up to 2,000 tuples of each length, and memory grows
    for hours.
    """
    tidying = asyncio.create_task(_tidy())
    try:
        yield
    finally:
        tidying.cancel()


async def _tidy() -> NoReturn:
    now_s = asyncio.get_running_loop().time
    sweep_at_s = now_s() + SWEEP_EVERY_S
    while True:
        await asyncio.sleep(TIDY_EVERY_S)
        if now_s() < sweep_at_s:
            _empty_free_lists()
        else:
            sweep_at_s = now_s() + max(SWEEP_EVERY_S, _sweep() / SWEEP_SHARE)


def _empty_free_lists() -> None:
    """Only a full collection does that. What there is by now is set aside first, so that it goes
    through nothing: it held iterations of 1,000 sequences up for 0.2 s."""
    gc.collect(0)
    gc.freeze()
    gc.collect()


def _sweep() -> float:
    """Go through everything; how long it took, in seconds."""
    began_s = time.perf_counter()
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    return time.perf_counter() - began_s
