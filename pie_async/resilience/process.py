"""The front's side of one engine process: from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from pathlib import Path

from pie_async.config import EngineConfig
from pie_async.errors import (
    ConfigError,
    DeviceFault,
    EngineStopped,
    EngineStuck,
    ModelError,
    PieError,
    UnsupportedModel,
    WeightsError,
)
from pie_async.messages import Message
from pie_async.resilience.wire import Failed, FromEngine, Start, Wire, WireError
from pie_async.runtime.faults import FaultPlan
from pie_async.runtime.watchdog import STUCK

WORKER = (
    "-P",  # nothing is imported from the working directory
    "-c",
    "import sys; _, fd, root = sys.argv; root in sys.path or sys.path.insert(0, root)\n"
    "from pie_async.resilience.worker import main; sys.exit(main(int(fd)))",
)
"""The interpreter's arguments; a socket's number and the package's directory follow."""
STACKS_S = 0.5
"""For a silent process to write its stacks to standard error, which takes no lock of Python's."""
LEAVE_S = 10.0
"""How long a process that was hung up on may take to end; then it is killed."""


_AS_THEY_ARE: tuple[type[PieError], ...] = (
    ModelError,
    WeightsError,
    EngineStuck,
    DeviceFault,
)
"""Errors whose message says it all. Any other name that the process sends is `EngineStopped`."""


class EngineProcess:
    """One process, connected. Never restarted: there is a new one for each life."""

    def __init__(self, process: asyncio.subprocess.Process, wire: Wire[FromEngine]) -> None:
        self._process = process
        self._wire = wire
        self._failed: Failed | None = None
        self._quiet: str | None = None
        self._heard = 0
        """Messages that came."""

    @classmethod
    async def spawn(cls, config: EngineConfig, faults: FaultPlan | None = None) -> EngineProcess:
        """Start one and tell it what to load."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *WORKER,
                    str(theirs.fileno()),
                    str(Path(__file__).parents[2]),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # standard output is for the front's results
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # a terminal's Ctrl-C is the front's to handle
                )
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours)
        wire: Wire[FromEngine] = Wire(reader, writer, FromEngine)
        wire.post(Start(config=config, faults=faults))
        return cls(process, wire)

    @property
    def pid(self) -> int:
        return self._process.pid

    def post(self, message: Message) -> None:
        """Send without waiting; to a dead process nothing is sent."""
        try:
            self._wire.post(message)
        except WireError as error:
            self.kill(str(error))

    async def send(self, message: Message) -> None:
        """Send, waiting while much is unread; to a dead process nothing is sent."""
        try:
            await self._wire.send(message)
        except WireError as error:
            self.kill(str(error))

    async def receive(self) -> FromEngine | None:
        """The next message; None when the process ended, or said what cannot be."""
        try:
            message = await self._wire.receive()
        except WireError as error:
            self.kill(str(error))
            return None
        self._heard += 1
        if isinstance(message, Failed):
            self._failed = message
        return message

    @property
    def has_next(self) -> bool:
        """Whether `receive` will not wait."""
        return self._wire.has_next

    async def kill_when_silent(self, silence_s: float) -> None:
        """Kill it once nothing came for so long. Ends only by being cancelled.

        Counted in quarters, so that a front that was stopped itself does not take what it
        missed for silence.
        """
        quarters, heard = 0, -1
        while quarters < 4:
            await asyncio.sleep(silence_s / 4)
            quarters = quarters + 1 if heard == self._heard else 0
            heard = self._heard
        self._send(signal.SIGUSR1)
        await asyncio.sleep(STACKS_S)
        self.kill(f"it said nothing for {silence_s:g} s")

    async def buried(self) -> str:
        """Make sure that it has ended, and say why in a few words."""
        self._wire.close()
        if self._quiet is None:  # it hung up; a moment for its own exit status
            await self._await_end()
        if self._process.returncode is None:
            self.kill(self._quiet or "it hung up and did not end")
            await self._await_end()
        status = self._process.returncode
        if status is None:  # it sleeps in a driver, which no signal wakes it from
            return f"{self._quiet}, and process {self.pid} does not even end when killed"
        if self._quiet is not None:
            return self._quiet
        if self._failed is not None:
            return self._failed.message
        if status == STUCK:
            return "it stood still and its watchdog ended it; the log above names the report"
        return f"signal {_name(-status)}" if status < 0 else f"exit status {status}"

    async def _await_end(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self._process.wait()

    def refusal(self) -> PieError | None:
        """The error it ended with, as its own process raised it."""
        return None if self._failed is None else _as_raised(self._failed)

    def kill(self, why: str) -> None:
        """End it at once; `why` is what `buried` will say."""
        self._quiet = self._quiet or why
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


def _as_raised(failed: Failed) -> PieError:
    if failed.kind == ConfigError.__name__:
        return ConfigError(failed.message, option=failed.option)
    if failed.kind == UnsupportedModel.__name__:  # its feature is named in the message
        return ModelError(failed.message)
    kinds = {kind.__name__: kind for kind in _AS_THEY_ARE}
    return kinds.get(failed.kind, EngineStopped)(failed.message)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
