"""Server-sent events over aiohttp."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing

from aiohttp import web

from pie_async.openai.answer import Answer

_log = logging.getLogger(__name__)

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold tokens back
}


async def send_events(
    request: web.Request, answer: Answer, *, stall_timeout_s: float
) -> web.StreamResponse:
    """Stream the answer; returns when it was sent, or cancelled because nobody reads it.

    A client that takes nothing for `stall_timeout_s` is cut off: its connection has no room
    even for an error event.
    """
    response = web.StreamResponse(headers=_HEADERS)
    try:
        await response.prepare(request)
        async with aclosing(answer.events()) as events:
            async for data in events:
                async with asyncio.timeout(stall_timeout_s):
                    await response.write(data)
        await response.write_eof()
    except TimeoutError:
        _log.warning(
            "%s: the client took nothing for %g s; cut off", answer.response_id, stall_timeout_s
        )
        if request.transport is not None:
            request.transport.abort()
    except ConnectionResetError:
        _log.debug("%s: the client went away", answer.response_id)
    return response
