"""The engine's process. It serves the socket that it was given and does not outlive it."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import select
import signal
import socket
import threading
import time

import uvloop

from pie_async.errors import EngineStopped, PieError
from pie_async.resilience.token_engine import TokenEngine
from pie_async.resilience.wire import (
    Alive,
    Failed,
    FromEngine,
    Loading,
    Look,
    Looked,
    Ready,
    Recall,
    Recalled,
    Shortened,
    Start,
    ToEngine,
    Wire,
    WireError,
)
from pie_async.runtime.heap import settle, tidied
from pie_async.runtime.logs import log_as
from pie_async.settings import variable_of

ALIVE_EVERY_S = 0.25
LEAVE_S = 5.0
"""How long the process may take to end once nobody is connected."""
REFUSED, FAILED = 2, 70
"""Exit status: it could not start; it failed."""


async def serve(connection: socket.socket) -> int:
    """Load what the first message says, then run it until the other end hangs up."""
    reader, writer = await asyncio.open_connection(sock=connection)
    wire: Wire[ToEngine] = Wire(reader, writer, ToEngine)
    start = await wire.receive()
    if not isinstance(start, Start):
        return REFUSED
    loop = asyncio.get_running_loop()
    alive = loop.create_task(_report(wire, None))
    try:
        engine = await TokenEngine.load(
            start.config,
            advanced=wire.post,
            shorter=lambda longest: wire.post(Shortened(max_model_len=longest)),
            progress=lambda done, total: _from_thread(loop, wire, Loading(done=done, total=total)),
            faults=start.faults,
        )
    except PieError as error:
        await _say_failed(wire, error)
        return REFUSED
    finally:
        alive.cancel()
    settle()
    wire.post(Ready(model=engine.model))
    async with tidied():
        return await _run(engine, wire)


async def _run(engine: TokenEngine, wire: Wire[ToEngine]) -> int:
    run = asyncio.create_task(engine.run())
    beside = [
        asyncio.create_task(_report(wire, engine)),
        asyncio.create_task(_obey(wire, engine)),
    ]
    await asyncio.wait([run, *beside], return_when=asyncio.FIRST_COMPLETED)
    for task in (*beside, run):  # nobody is connected, so nobody waits for what runs
        task.cancel()
    *mistakes, end = await asyncio.gather(*beside, run, return_exceptions=True)
    if isinstance(end, EngineStopped):
        await _say_failed(wire, end)
        return FAILED
    for mistake in (*mistakes, end):
        if isinstance(mistake, Exception):
            raise mistake
    return 0


async def _obey(wire: Wire[ToEngine], engine: TokenEngine) -> None:
    with contextlib.suppress(EngineStopped):  # which `run` tells of
        while (command := await wire.receive()) is not None:
            match command:
                case Start():
                    raise WireError("started twice")
                case Look():
                    view = engine.look(since_s=command.since_s)
                    wire.post(Looked(number=command.number, view=view))
                case Recall():
                    timeline = engine.timeline(last_iterations=command.last_iterations)
                    wire.post(Recalled(number=command.number, timeline=timeline))
                case _:
                    await engine.tell(command)


async def _report(wire: Wire[ToEngine], engine: TokenEngine | None) -> None:
    while True:
        wire.post(Alive(stats=None if engine is None else engine.stats()))
        await asyncio.sleep(ALIVE_EVERY_S)


async def _say_failed(wire: Wire[ToEngine], error: PieError) -> None:
    option = getattr(error, "option", None)
    await wire.send(Failed(kind=type(error).__name__, message=str(error), option=option))
    wire.close()


def _from_thread(
    loop: asyncio.AbstractEventLoop, wire: Wire[ToEngine], message: FromEngine
) -> None:
    loop.call_soon_threadsafe(wire.post, message)


def _end_with(connection: socket.socket) -> None:
    """A thread of its own, so that a stuck loop or device cannot keep an orphan alive."""
    hangup = select.poll()
    hangup.register(connection.fileno(), 0)  # a hangup is always told
    hangup.poll()
    time.sleep(LEAVE_S)
    os._exit(FAILED)


def main(fd: int) -> int:
    """Serve the socket of this number; the exit status."""
    # The front decides when this ends: what is sent to all processes of a group is its to handle.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    log_as(os.environ.get(variable_of("log-format"), "text"))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # which the front sends before it kills a silent one
    connection = socket.socket(fileno=fd)
    watched = connection.dup()
    threading.Thread(target=_end_with, args=(watched,), name="pie-orphan", daemon=True).start()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(connection))
