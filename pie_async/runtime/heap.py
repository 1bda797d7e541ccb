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

SWEEP_EVERY_S = 60.0
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
async def swept() -> AsyncIterator[None]:
    """Inside, all garbage is collected once a minute, less often where that takes long.

    A server that makes no cycles hardly ever has so many new objects that Python would look. Then
    nothing empties its free lists, up to 2,000 tuples of each length, and memory grows for hours.
    """
    sweeping = asyncio.create_task(_sweep())
    try:
        yield
    finally:
        sweeping.cancel()


async def _sweep() -> NoReturn:
    took_s = 0.0
    while True:
        await asyncio.sleep(max(SWEEP_EVERY_S, took_s / SWEEP_SHARE))
        began_s = time.perf_counter()
        gc.collect()
        took_s = time.perf_counter() - began_s
