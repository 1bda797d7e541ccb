"""Reading request bodies: only JSON, only so much, only for so long."""

from __future__ import annotations

import asyncio

from aiohttp import web

from pie_async.errors import InvalidRequest
from pie_async.openai.errors import BodyTimeout, BodyTooLarge, NotJson


async def read_body(request: web.Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The body, decompressed where the client compressed it.

    Reads itself rather than through `request.read()`, whose limit is the outermost
    application's: this one holds where the app is mounted in another, too.

    Raises:
        NotJson: the Content-Type says otherwise. A missing one is refused too: browsers send
            JSON to foreign origins without asking first only when its type is not declared.
        BodyTooLarge, BodyTimeout
        InvalidRequest: the transfer or its compression is broken.
    """
    _check_content_type(request)
    if (request.content_length or 0) > max_bytes:
        raise BodyTooLarge(limit_bytes=max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.content.iter_any():
                num_bytes += len(part)
                if num_bytes > max_bytes:
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
