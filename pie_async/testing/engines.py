"""Engines for tests, checked when the test is over; and the loop to run them on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, TypeVar

from pie_async.config import KIB
from pie_async.engine import Engine
from pie_async.runtime.faults import AnyFault, FaultPlan
from pie_async.runtime.virtual_time import VirtualTimeLoop
from pie_async.testing.checks import check_returned
from pie_async.testing.stories import check_answered

T = TypeVar("T")

DEADLOCK_S = 2.0
"""Real seconds after which a loop on which nothing happens is called deadlocked."""
BLOCK_BYTES = 32 * KIB
"""A KV block of the simulated model "tiny": 16 tokens."""


def run_in_virtual_time(main: Coroutine[Any, Any, T], *, order_seed: int | None = None) -> T:
    """As `asyncio.run`, on a clock that jumps to the next timer whenever all tasks wait.

    Args:
        order_seed: draws which of the ready callbacks runs next; None: first come, first served.

    Raises:
        Deadlock: all tasks wait and no timer is set; names where they wait.
        ExceptionGroup: callbacks or tasks failed that nobody awaited.
    """
    loop_factory = partial(VirtualTimeLoop, order_seed=order_seed, deadlock_after_s=DEADLOCK_S)
    with asyncio.Runner(loop_factory=loop_factory) as runner, none_unheard(runner.get_loop()):
        return runner.run(main)


@contextmanager
def none_unheard(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """What failed meanwhile without anybody being told, such as a callback, fails the test.

    Raises:
        ExceptionGroup: with what failed, unless the block itself raises.
    """
    unheard: list[Exception] = []

    def hear(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        error = context.get("exception")
        unheard.append(error if isinstance(error, Exception) else RuntimeError(context["message"]))

    before = loop.get_exception_handler()
    loop.set_exception_handler(hear)
    try:
        yield
    finally:
        loop.set_exception_handler(before)
    if unheard:
        raise ExceptionGroup("failed, and nobody was told", unheard)


@asynccontextmanager
async def simulated_engine(
    *,
    device_blocks: int = 64,
    host_blocks: int = 256,
    faults: FaultPlan | Iterable[AnyFault] | None = None,
    may_stop: bool = False,
    **options: Any,
) -> AsyncIterator[Engine]:
    """A started engine on the simulated device, with its checker and all invariants on.

    Its story is kept whole. When the block is left, `checked` says what must hold.

    Args:
        device_blocks: KV blocks of 16 tokens that the device holds.
        host_blocks: that the pool holds.
        faults: what is to go wrong with it.
        may_stop: it is all right if the engine stops.
        options: other fields of `EngineConfig`.
    """
    if faults is not None and not isinstance(faults, FaultPlan):
        faults = FaultPlan(faults=tuple(faults))
    defaults: dict[str, Any] = {
        "device": "sim",
        "model": "tiny",
        "debug": True,
        "device_kv_bytes": device_blocks * BLOCK_BYTES,
        "host_pool_bytes": host_blocks * BLOCK_BYTES,
    }
    engine = Engine(faults=faults, **(defaults | options))
    async with checked(engine, may_stop=may_stop):
        yield engine


@asynccontextmanager
async def checked(engine: Engine, *, may_stop: bool = False) -> AsyncIterator[Engine]:
    """Start an engine; at the end drain it and see that it gave everything back.

    If the block raises, the engine is closed and nothing is checked.

    Raises:
        AssertionError, InvariantBroken: something is still held, or a command had no end or two.
        EngineStopped: it stopped, and may not.
        ExceptionGroup: callbacks or tasks failed that nobody awaited.
    """
    with none_unheard(asyncio.get_running_loop()):
        async with engine:
            assert engine.story is not None
            engine.story.keep_all()
            yield engine
            if engine.is_running:
                await engine.drain()
                check_returned(engine)
                check_answered(engine.story)
            elif not may_stop and engine.failure is not None:
                raise engine.failure
