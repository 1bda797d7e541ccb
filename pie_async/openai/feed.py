"""The outputs of one or several accepted requests as one feed that never goes silent."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


Take = Callable[[Arrival], bool]
"""Takes an arrival, or says False."""


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
        self._take: Take | None = None
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
        self, *, silence_s: float, take: Take | None = None
    ) -> list[Arrival] | None:
        """Everything that came since the last call; waits for something to come.

        Args:
            take: asked first while this waits: what it takes is not returned, and wakes nobody.

        Returns:
            None when every stream has ended; an empty list after `silence_s` without output.

        Raises:
            PieError, or whatever a stream raised, once all that came before it was returned.
        """
        if not self._arrived and self._error is None and self._unfinished:
            await self._wait(silence_s, take)
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

    async def _pump(self, index: int, stream: OutputStream) -> None:
        ended: set[int] = set()
        async for output in stream:
            news = _without(ended, output)
            for choice in news.outputs:
                if choice.finish_reason:
                    ended.add(choice.index)
            arrival = Arrival(index, news, self._loop.time())
            if self._take is not None and self._take(arrival):
                self._waits_until_s = arrival.at_s + self._silence_s
                continue
            self._arrived.append(arrival)
            self._wake()
            while len(self._arrived) >= MOST_WAITING:
                self._has_room.clear()
                await self._has_room.wait()

    def _pump_ended(self, pump: asyncio.Task[None]) -> None:
        self._unfinished.discard(pump)
        if pump.cancelled():
            if not self._is_closing:
                self.fail(EngineStopped("the engine cancelled the request"))
        elif (error := pump.exception()) is not None:
            self.fail(error)
        if not self._unfinished:  # else there is nothing to tell, and it would look like silence
            self._wake()

    async def _wait(self, silence_s: float, take: Take | None) -> None:
        self._waiter, self._take = self._loop.create_future(), take
        self._silence_s = silence_s
        self._waits_until_s = self._loop.time() + silence_s
        if self._alarm is None:  # one that runs already looks again: a timer per token costs more
            self._alarm = self._loop.call_at(self._waits_until_s, self._ring)
        try:
            await self._waiter
        finally:
            self._waiter = self._take = None

    def _ring(self) -> None:
        self._alarm = None
        if self._waiter is None:
            return
        if self._loop.time() < self._waits_until_s:
            self._alarm = self._loop.call_at(self._waits_until_s, self._ring)
        else:
            self._wake()

    def _wake(self) -> None:
        self._take = None  # it waits no longer: what comes now comes after what woke it
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _without(ended: set[int], output: RequestOutput) -> RequestOutput:
    """An engine may go on showing choices that have ended; a client must see each end once."""
    if not ended:
        return output
    news = tuple(choice for choice in output.outputs if choice.index not in ended)
    return msgspec.structs.replace(output, outputs=news)
