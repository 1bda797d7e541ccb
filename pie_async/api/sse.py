"""Answers over aiohttp, to clients that may not read them."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

from aiohttp import HttpVersion11, web

from pie_async.openai.answer import Answer

_log = logging.getLogger(__name__)

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold tokens back
}


_UNREAD_BYTES = 16 * 1024
"""What may wait in the kernel, which would take megabytes for a client that reads nothing, and in
the transport: both count about twice."""
_NEVER_BLOCKS_BYTES = 16 * 1024
"""No more than the transport's high-water mark."""


async def send_events(
    request: web.Request, answer: Answer, *, stall_timeout_s: float
) -> web.StreamResponse:
    """Stream the answer; returns when it was sent, or cancelled because nobody reads it.

    A client that takes nothing for `stall_timeout_s` is cut off.
    """
    events = answer.events(_ToSocket.of(request))
    return await send_stream(request, answer.response_id, events, stall_timeout_s=stall_timeout_s)


async def send_stream(
    request: web.Request, name: str, stream: AsyncGenerator[bytes, None], *, stall_timeout_s: float
) -> web.StreamResponse:
    """The same for any events, which are closed at the end; `name` is for the log."""
    response = web.StreamResponse(headers=_HEADERS)
    if request.transport is not None:
        sock = request.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_BYTES)
        request.transport.set_write_buffer_limits(high=_UNREAD_BYTES)
    with _cutting_off(request, name, stall_timeout_s):
        await response.prepare(request)
        async with aclosing(stream) as events:
            async for data in events:
                await _write(request, response, data, stall_timeout_s)
        async with asyncio.timeout(stall_timeout_s):
            await response.write_eof()
    return response


async def send_body(
    request: web.Request, answer: Answer, *, stall_timeout_s: float
) -> web.StreamResponse:
    """Send the answer as one body; a client that takes nothing is cut off as by `send_events`."""
    body = await answer.body()
    if len(body) <= _NEVER_BLOCKS_BYTES:
        return web.Response(body=body, content_type="application/json")
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = len(body)
    with _cutting_off(request, answer.response_id, stall_timeout_s):
        await response.prepare(request)
        for start in range(0, len(body), _NEVER_BLOCKS_BYTES):
            piece = body[start : start + _NEVER_BLOCKS_BYTES]
            await _write(request, response, piece, stall_timeout_s)
        async with asyncio.timeout(stall_timeout_s):
            await response.write_eof()
    return response


class _ToSocket:
    """Chunks written past aiohttp, whose way costs as much as all else of a token, and which waits
    where this cannot. Open while the client has taken all that was sent."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    @classmethod
    def of(cls, request: web.Request) -> _ToSocket | None:
        """None where answers do not come in chunks, or nobody is left to take them."""
        is_chunked = request.version >= HttpVersion11
        return cls(request.transport) if is_chunked and request.transport is not None else None

    def is_open(self) -> bool:
        """See `Shortcut`."""
        transport = self._transport
        return not transport.is_closing() and transport.get_write_buffer_size() == 0

    def send(self, events: bytes) -> None:
        """See `Shortcut`."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(events), events))


@contextmanager
def _cutting_off(request: web.Request, name: str, stall_timeout_s: float) -> Iterator[None]:
    """Its connection has no room even for an error."""
    try:
        yield
    except TimeoutError:
        _log.warning("%s: the client took nothing for %g s; cut off", name, stall_timeout_s)
        if request.transport is not None:
            request.transport.abort()
    except ConnectionResetError:
        _log.debug("%s: the client went away", name)


async def _write(
    request: web.Request, response: web.StreamResponse, data: bytes, stall_timeout_s: float
) -> None:
    """Raises TimeoutError when the client does not make room in time."""
    transport = request.transport
    has_room = transport is not None and transport.get_write_buffer_size() == 0
    if has_room and len(data) <= _NEVER_BLOCKS_BYTES:
        await response.write(data)  # a timer per token would cost as much as encoding it
    else:
        async with asyncio.timeout(stall_timeout_s):
            await response.write(data)
