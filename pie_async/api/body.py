"""Reading request bodies: only JSON, only so much, only for so long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from pie_async.errors import InvalidRequest, Overloaded
from pie_async.openai.errors import BodyTimeout, BodyTooLarge, NotJson


class BodyRoom:
    """How many bytes of bodies the server holds at once, those being read and those not yet
    accepted."""

    def __init__(self, most_bytes: int) -> None:
        self._free_bytes = most_bytes

    @contextmanager
    def share(self) -> Iterator[Share]:
        """What one body takes; given back at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            self._free_bytes += share.num_bytes

    def take(self, num_bytes: int) -> None:
        """Raises Overloaded if there is not so much room."""
        if num_bytes > self._free_bytes:
            raise Overloaded("too many bytes of requests are being read; try again")
        self._free_bytes -= num_bytes


class Share:
    """One body's part of the room."""

    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        self._room.take(num_bytes)
        self.num_bytes += num_bytes


async def read_body(
    request: web.Request, share: Share, *, max_bytes: int, timeout_s: float
) -> bytes:
    """The body, decompressed where the client compressed it.

    Reads itself rather than through `request.read()`, whose limit is the outermost
    application's: this one holds where the app is mounted in another, too.

    Raises:
        NotJson: the Content-Type says otherwise. A missing one is refused too: browsers send
            JSON to foreign origins without asking first only when its type is not declared.
        BodyTooLarge, BodyTimeout
        Overloaded: other bodies take all the room.
        InvalidRequest: the transfer or its compression is broken.
    """
    _check_content_type(request)
    if (request.content_length or 0) > max_bytes:
        raise BodyTooLarge(limit_bytes=max_bytes)
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.content.iter_any():
                share.add(len(part))
                if share.num_bytes > max_bytes:
                    raise BodyTooLarge(limit_bytes=max_bytes)
                parts.append(part)
    except TimeoutError as error:
        raise BodyTimeout(f"the body did not arrive within {timeout_s:g} s") from error
    except web.RequestPayloadError as error:
        raise InvalidRequest("the body is damaged: its length or compression is wrong") from error
    return b"".join(parts)


def _check_content_type(request: web.Request) -> None:
    sent = request.headers.get("Content-Type")
    is_json = sent is not None and request.content_type in ("application/json", "text/json")
    if not is_json or (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise NotJson(
            f"the Content-Type is {(sent or 'missing')[:80]!r}; send 'application/json' in UTF-8"
        )
