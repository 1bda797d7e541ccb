"""What commands share: the loop, a started engine, the terminal."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pie_async.config import EngineConfig
from pie_async.runtime.heap import settled

if TYPE_CHECKING:
    from rich.console import Console

    from pie_async.engine import Engine
    from pie_async.resilience.engine import ResilientEngine
    from pie_async.runtime.faults import FaultPlan

T = TypeVar("T")
E = TypeVar("E", "Engine", "ResilientEngine")


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a command, or a part of one, on uvloop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """Run a command on a clock that jumps: for the simulated device."""
    from pie_async.runtime.virtual_time import VirtualTimeLoop

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def messages() -> Console:
    """Where progress and remarks go, so that standard output holds results alone."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def started(
    config: EngineConfig, faults: FaultPlan | None = None, *, exits_when_stuck: bool = False
) -> AbstractAsyncContextManager[Engine]:
    """A started engine in this process; a bar shows the weights being loaded."""
    from pie_async.engine import Engine

    return starting(Engine(config, faults=faults, exits_when_stuck=exits_when_stuck))


@asynccontextmanager
async def begun(context: AbstractAsyncContextManager[T]) -> AsyncIterator[asyncio.Task[T]]:
    """A context that is entered while the block runs, which waits for it when it has to; it is left
    when the block is."""
    async with AsyncExitStack() as stack:
        entering = asyncio.create_task(stack.enter_async_context(context))
        try:
            yield entering
        finally:
            entering.cancel()  # nothing happens if it was entered
            await asyncio.gather(entering, return_exceptions=True)


@asynccontextmanager
async def starting(engine: E) -> AsyncIterator[E]:
    """The engine, started; a bar shows the weights being loaded."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn())
    console = messages()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(engine.config.model, total=None)
        await engine.start(
            progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    try:
        with settled():
            yield engine
    finally:
        await engine.aclose()


@asynccontextmanager
async def apart(
    config: EngineConfig, faults: FaultPlan | None
) -> AsyncIterator[Engine | ResilientEngine]:
    """An engine in a process of its own. When it is given up, the server ends as on a signal, and
    its failure is raised."""
    from pie_async.resilience.engine import ResilientEngine
    from pie_async.watching import watch_loop

    async with starting(ResilientEngine(config, faults=faults)) as running:
        watchdog = watch_loop(config)

        async def stop_when_failed() -> None:
            await running.failed()
            signal.raise_signal(signal.SIGTERM)

        watch = asyncio.create_task(stop_when_failed())
        try:
            yield running
        finally:
            watch.cancel()
            if watchdog is not None:
                watchdog.close()
        if running.failure is not None:
            raise running.failure
