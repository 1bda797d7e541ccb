"""The outputs of one or several accepted requests as one feed that never goes silent."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from pie_async.errors import EngineStopped
from pie_async.openai.backend import OutputStream
from pie_async.outputs import RequestOutput

MOST_WAITING = 16
"""Outputs that wait for a client; later ones of a stream wait in the engine, in one piece."""


class Arrival(NamedTuple):
    """An output, which prompt it belongs to, and when it came (loop time, seconds)."""

    prompt_index: int
    output: RequestOutput
    at_s: float


class Outlet(Protocol):
    """Takes arrivals while somebody waits for them, so that nobody has to be woken."""

    def is_open(self) -> bool:
        """Whether it takes one now."""
        ...

    def take(self, arrival: Arrival) -> None: ...


class OutputFeed:
    """Merges the streams of one HTTP request, in order of arrival.

    One task per stream reads it as fast as it goes, until `MOST_WAITING` outputs wait here: a
    client that takes nothing is then to the engine a reader that takes nothing. Whoever builds a
    feed must `aclose()` it: that cancels whatever has not finished.
    """

    def __init__(self, streams: Sequence[OutputStream]) -> None:
        self._loop = asyncio.get_running_loop()
        self._streams = streams
        self._arrived: deque[Arrival] = deque()
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._silence_s = 0.0
        self._waits_until_s = 0.0
        self._outlet: Outlet | None = None
        """Of whoever waits, until woken."""
        self._has_room = asyncio.Event()
        self._is_closing = False
        self._unfinished = {
            self._loop.create_task(self._pump(index, stream), name=f"feed-{stream.request_id}")
            for index, stream in enumerate(streams)
        }
        for pump in self._unfinished:
            pump.add_done_callback(self._pump_ended)

    async def next_arrivals(
        self, *, silence_s: float, outlet: Outlet | None = None
    ) -> list[Arrival] | None:
        """Everything that came since the last call; waits for something to come.

        Args:
            outlet: where arrivals go, while it is open and this waits; they are not returned.

        Returns:
            None when every stream has ended; an empty list after `silence_s` without output.

        Raises:
            PieError, or whatever a stream raised, once all that came before it was returned.
        """
        if not self._arrived and self._error is None and self._unfinished:
            await self._wait(silence_s, outlet)
        if self._arrived:
            arrivals = list(self._arrived)
            self._arrived.clear()
            self._has_room.set()
            return arrivals
        if self._error is not None:
            raise self._error
        return [] if self._unfinished else None

    def fail(self, error: BaseException) -> None:
        """End the feed with this error; its requests are cancelled when it is closed."""
        if self._error is None:
            self._error = error
            self._wake()

    async def aclose(self) -> None:
        """Cancel what has not finished and return when nothing of it is left."""
        self._is_closing = True
        if self._alarm is not None:
            self._alarm.cancel()
        for stream in self._streams:
            stream.cancel()  # before the first await: a second cancellation cannot prevent it
        for pump in self._unfinished:
            pump.cancel()
        if self._unfinished:
            await asyncio.wait(self._unfinished)

    def is_open(self) -> bool:
        """Whether `hand_over` may be called: an outlet waits for what comes next."""
        return self._outlet is not None and self._outlet.is_open()

    def hand_over(self, arrival: Arrival) -> None:
        """Give the outlet what came."""
        assert self._outlet is not None
        self._waits_until_s = arrival.at_s + self._silence_s
        self._outlet.take(arrival)

    async def _pump(self, index: int, stream: OutputStream) -> None:
        source = stream.shortcut = _Source(self, index)
        try:
            async for output in stream:
                arrival = source.arrival(output)
                if self.is_open():
                    self.hand_over(arrival)
                    continue
                self._arrived.append(arrival)
                self._wake()
                while len(self._arrived) >= MOST_WAITING:
                    self._has_room.clear()
                    await self._has_room.wait()
        finally:
            stream.shortcut = None  # else both would refer to each other, and stay until swept

    def _pump_ended(self, pump: asyncio.Task[None]) -> None:
        self._unfinished.discard(pump)
        if pump.cancelled():
            if not self._is_closing:
                self.fail(EngineStopped("the engine cancelled the request"))
        elif (error := pump.exception()) is not None:
            self.fail(error)
        if not self._unfinished:  # else there is nothing to tell, and it would look like silence
            self._wake()

    async def _wait(self, silence_s: float, outlet: Outlet | None) -> None:
        self._waiter, self._outlet = self._loop.create_future(), outlet
        self._silence_s = silence_s
        self._waits_until_s = self._loop.time() + silence_s
        if self._alarm is None:  # one that runs already looks again: a timer per token costs more
            self._alarm = self._loop.call_at(self._waits_until_s, self._ring)
        try:
            await self._waiter
        finally:
            self._waiter = self._outlet = None

    def _ring(self) -> None:
        self._alarm = None
        if self._waiter is None:
            return
        if self._loop.time() < self._waits_until_s:
            self._alarm = self._loop.call_at(self._waits_until_s, self._ring)
        else:
            self._wake()

    def _wake(self) -> None:
        self._outlet = None  # nobody waits any longer: what comes now comes after what woke them
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Source:
    """One stream's way into the feed: what it offers while it is waited for goes straight on."""

    def __init__(self, feed: OutputFeed, index: int) -> None:
        self._feed = feed
        self._index = index
        self._now_s = asyncio.get_running_loop().time
        self._ended: set[int] = set()
        self.is_open = feed.is_open

    def send(self, output: RequestOutput) -> None:
        """See `OutputShortcut`."""
        try:
            self._feed.hand_over(self.arrival(output))
        except Exception as error:  # the engine, which calls this, is not to blame
            self._feed.fail(error)

    def arrival(self, output: RequestOutput) -> Arrival:
        """What came, less the choices that have ended: an engine may go on showing them, and a
        client must see each end once."""
        if self._ended:
            news = tuple([choice for choice in output.outputs if choice.index not in self._ended])
            output = msgspec.structs.replace(output, outputs=news)
        for choice in output.outputs:
            if choice.finish_reason:
                self._ended.add(choice.index)
        return Arrival(self._index, output, self._now_s())
