"""One accepted request on its way to the client: as server-sent events or as one body."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from typing import Protocol

from pie_async.errors import PieError
from pie_async.openai.errors import ErrorReply, error_reply
from pie_async.openai.feed import Arrival, Outlet, OutputFeed
from pie_async.openai.framing import KEEPALIVE, Framing, encoder
from pie_async.openai.latency import RequestLatency
from pie_async.openai.responses import Response, Usage
from pie_async.openai.usage import UsageCounter
from pie_async.outputs import RequestOutput

_log = logging.getLogger(__name__)
_FAILED = "request %s failed: %s"


class Writer(Protocol):
    """One endpoint's dialect: `ChatWriter`, `CompletionWriter` or `ResponseWriter`."""

    framing: Framing

    def opening(self) -> Iterator[Response]: ...

    def events(self, prompt_index: int, output: RequestOutput, /) -> bytes:
        """What a delta output is sent as; empty if it has nothing to show yet."""
        ...

    def ending(self, usage: Usage) -> Iterator[Response]:
        """What a stream ends with when all choices have."""
        ...

    def failure(self, reply: ErrorReply) -> bytes:
        """The event that a stream ends with when it failed."""
        ...

    def response(self, outputs: Sequence[RequestOutput], usage: Usage) -> Response: ...


class Shortcut(Protocol):
    """Sends events past whoever iterates over them, and so without a task being woken."""

    def is_open(self) -> bool:
        """Whether what is sent now need not wait."""
        ...

    def send(self, events: bytes) -> None: ...


class Answer:
    """Produces what the client gets. Must be closed: that cancels what has not finished."""

    def __init__(
        self,
        *,
        response_id: str,
        feed: OutputFeed,
        writer: Writer,
        usage: UsageCounter,
        latency: RequestLatency,
        is_streamed: bool,
        keepalive_s: float,
    ) -> None:
        self.response_id = response_id
        self.is_streamed = is_streamed
        self._feed = feed
        self._writer = writer
        self._usage = usage
        self._latency = latency
        self._frames = writer.framing.frames
        self._keepalive_s = keepalive_s

    async def events(self, shortcut: Shortcut | None = None) -> AsyncGenerator[bytes]:
        """Server-sent events, several at a time when they came at the same time.

        Ends as the endpoint's streams do or, if anything fails, with an error event. A comment is
        sent when nothing came for `keepalive_s`. Closing the generator cancels the request.

        Args:
            shortcut: takes events, while it is open and the iterator waits for the next ones;
                they are then not yielded.
        """
        outlet = None if shortcut is None else _Outlet(self._count, self._writer.events, shortcut)
        try:
            if opening := self._frames(self._writer.opening()):
                yield opening
            while (arrivals := await self._next_arrivals(outlet)) is not None:
                if events := self._event_bytes(arrivals) if arrivals else KEEPALIVE:
                    yield events
            self._finish()
            yield self._frames(self._writer.ending(self._usage.usage)) + self._writer.framing.end
        except Exception as error:  # the status line is out: an event is all that can tell
            log_failure(error, self.response_id)
            yield self._writer.failure(error_reply(error))
        finally:
            await self.aclose()

    async def body(self) -> bytes:
        """The whole response as JSON, when all choices have ended.

        Raises:
            PieError: the engine could not finish the request, which is then cancelled.
        """
        try:
            final: dict[int, RequestOutput] = {}
            while (arrivals := await self._next_arrivals()) is not None:
                final.update((arrival.prompt_index, arrival.output) for arrival in arrivals)
            self._finish()
            outputs = [final[prompt_index] for prompt_index in sorted(final)]
            return encoder.encode(self._writer.response(outputs, self._usage.usage))
        finally:
            await self.aclose()

    def fail(self, error: PieError) -> None:
        """End it early: with this error instead of what is still missing."""
        self._feed.fail(error)

    async def aclose(self) -> None:
        """Cancel what has not finished and wait until the engine has let go of it."""
        await self._feed.aclose()

    def _count(self, arrival: Arrival) -> None:
        self._usage.add(arrival.prompt_index, arrival.output)
        self._latency.observe(arrival)

    async def _next_arrivals(self, outlet: Outlet | None = None) -> list[Arrival] | None:
        arrivals = await self._feed.next_arrivals(silence_s=self._keepalive_s, outlet=outlet)
        for arrival in arrivals or ():
            self._count(arrival)
        return arrivals

    def _event_bytes(self, arrivals: Iterable[Arrival]) -> bytes:
        """Empty if the arrivals hold nothing to show yet."""
        return b"".join(
            [self._writer.events(arrival.prompt_index, arrival.output) for arrival in arrivals]
        )

    def _finish(self) -> None:
        self._latency.finish(asyncio.get_running_loop().time())


class _Outlet:
    """From the feed to the shortcut."""

    def __init__(
        self,
        count: Callable[[Arrival], None],
        events: Callable[[int, RequestOutput], bytes],
        shortcut: Shortcut,
    ) -> None:
        self._count = count
        self._events = events
        self._send = shortcut.send
        self.is_open = shortcut.is_open

    def take(self, arrival: Arrival) -> None:
        self._count(arrival)
        if events := self._events(arrival.prompt_index, arrival.output):
            self._send(events)


def log_failure(error: BaseException, name: str) -> None:
    """Log what is not the client's fault: with a traceback if the client is not told about it.

    A stopped engine fails every request alike; its owner has the traceback.
    """
    status = error_reply(error).status
    if status == 500:
        _log.error(_FAILED, name, error, exc_info=error, extra={"request_id": name})
    elif status > 500:
        _log.warning(_FAILED, name, error, extra={"request_id": name})
