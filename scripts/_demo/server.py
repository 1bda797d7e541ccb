"""The server of the demo: a process of its own on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from typing import IO

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 15.0
_READY = re.compile(r"serving \S+ at (http://\S+)/v1")


class ServerFailed(Exception):
    """The server did not start, or ended on its own; the message ends with what it said."""


class Server:
    """A running `pie-async serve`."""

    def __init__(self, url: str, process: asyncio.subprocess.Process) -> None:
        self.url = url
        self._process = process

    async def until_ended(self) -> None:
        """Raises ServerFailed when it ends: nobody has told it to."""
        raise ServerFailed(f"the server ended with status {await self._process.wait()}")


@contextlib.asynccontextmanager
async def serving(flags: Sequence[str]) -> AsyncIterator[Server]:
    """`pie-async serve` with these flags, until the block ends.

    Raises:
        ServerFailed: it did not start, or ended inside the block.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pie_async", "serve", "--port", "0", *flags),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env={name: value for name, value in os.environ.items() if name[:4] != "PIE_"},
            start_new_session=True,  # Ctrl-C reaches us alone; we stop the server
        )
        try:
            server = Server(await _ready(process), process)
            async with _ended_is_failed(process):
                yield server
        except ServerFailed as failure:
            raise ServerFailed(f"{failure}\n{_tail(errors)}".rstrip()) from None
        finally:
            await _stop(process)


async def _ready(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            async for line in process.stdout:
                if ready := _READY.match(line.decode()):
                    return ready.group(1)
    except TimeoutError:
        raise ServerFailed(f"the server did not start within {_START_TIMEOUT_S:.0f} s") from None
    status = await process.wait()
    raise ServerFailed(f"the server ended with status {status} before it served")


@contextlib.asynccontextmanager
async def _ended_is_failed(process: asyncio.subprocess.Process) -> AsyncIterator[None]:
    """Turns the body's own error into the server's when the server is gone."""
    try:
        yield
    except ServerFailed:
        raise
    except Exception as error:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 1.0)
        if process.returncode is None:
            raise
        raise ServerFailed(f"the server ended with status {process.returncode}") from error


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def _tail(errors: IO[str], lines: int = 40) -> str:
    errors.seek(0)
    return "".join(errors.readlines()[-lines:])
