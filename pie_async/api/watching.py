"""The routes for people: the page, the feed that it shows, and a trace to look at closely.

The engine is looked at only while somebody watches, once for all who do.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import msgspec
from aiohttp import web

import pie_async
from pie_async.api.page import Page
from pie_async.api.sse import send_stream
from pie_async.errors import EngineStopped, InvalidRequest
from pie_async.live.chrome_trace import chrome_trace
from pie_async.live.frame import LiveFrame, Rates
from pie_async.openai.backend import Backend

EVERY_S = 0.25
IDLE_EVERY_S = 1.0
"""While nothing happens."""
MOST_ITERATIONS = 4096
DEFAULT_ITERATIONS = 200

_encoder = msgspec.json.Encoder()


class Feed:
    """Looks at the engine for whoever waits for the next frame.

    There is no task: the first watcher who finds the last frame old looks, and the others take
    what it saw.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._rates: Rates | None = None
        self._lock = asyncio.Lock()
        self._closed = asyncio.Event()
        self._number = 0
        self._event = b""
        self._looked_s = 0.0
        self._pause_s = EVERY_S
        self.num_looks = 0

    def close(self) -> None:
        """Whoever watches has seen enough."""
        self._closed.set()

    async def frames(self, *, most: int | None) -> AsyncGenerator[bytes, None]:
        """Events, as many as asked for, or until the server stops. Who is late misses some."""
        seen, sent = 0, 0
        while not self._closed.is_set() and (most is None or sent < most):
            if not self._has_news(seen):
                async with self._lock:
                    if not self._has_news(seen):
                        await self._wait()
                        if self._closed.is_set():
                            return
                        await self._look()
            seen = self._number
            yield self._event
            sent += 1

    def _has_news(self, seen: int) -> bool:
        """Whether the last frame is another one than `seen`, and not an old one."""
        return self._number > seen and self._age_s() < self._pause_s

    def _age_s(self) -> float:
        return asyncio.get_running_loop().time() - self._looked_s

    async def _wait(self) -> None:
        """Until the next look is due, or the server stops."""
        remaining_s = self._pause_s - self._age_s()
        if self._number and remaining_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(remaining_s):
                    await self._closed.wait()

    async def _look(self) -> None:
        if self._rates is None:
            self._rates = Rates(model=self._backend.model.name, version=pie_async.__version__)
        if self._age_s() > 3 * IDLE_EVERY_S:
            self._rates.forget()  # nobody watched
        try:
            view = await self._backend.look(since_s=self._rates.since_s)
        except EngineStopped as stopped:
            self._rates.forget()
            self._take(_event("stopped", _encoder.encode({"message": str(stopped)})))
            self._pause_s = IDLE_EVERY_S
            return
        frame = self._rates.frame(view, is_accepting=self._backend.is_accepting)
        self._pause_s = EVERY_S if is_busy(frame) else IDLE_EVERY_S
        self._take(_event("frame", _encoder.encode(frame)))

    def _take(self, event: bytes) -> None:
        self._event = event
        self._number += 1
        self.num_looks += 1
        self._looked_s = asyncio.get_running_loop().time()


def is_busy(frame: LiveFrame) -> bool:
    """Whether the next frame will tell anything new."""
    return bool(frame.view.sequences or frame.view.spans)


def _event(kind: str, data: bytes) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


class Watching:
    """The handlers."""

    def __init__(self, backend: Backend, *, stall_timeout_s: float) -> None:
        self._backend = backend
        self._stall_timeout_s = stall_timeout_s
        self._page = Page()
        self.feed = Feed(backend)

    async def page(self, _request: web.Request) -> web.Response:
        """GET /"""
        return self._page.response()

    async def view(self, request: web.Request) -> web.StreamResponse:
        """GET /view"""
        most = _count(request, "frames", default=None)
        return await send_stream(
            request,
            "view",
            self.feed.frames(most=most),
            stall_timeout_s=self._stall_timeout_s,
        )

    async def trace(self, request: web.Request) -> web.Response:
        """GET /trace"""
        count = _count(request, "iterations", default=DEFAULT_ITERATIONS)
        told = await self._backend.timeline(last_iterations=count or DEFAULT_ITERATIONS)
        body = await asyncio.to_thread(chrome_trace, told)
        return web.Response(
            body=body,
            content_type="application/json",
            headers={"Content-Disposition": 'attachment; filename="pie_async-trace.json"'},
        )


def _count(request: web.Request, name: str, *, default: int | None) -> int | None:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise _not_a_count(name, text)
    if not 1 <= int(text) <= MOST_ITERATIONS:
        raise _not_a_count(name, text)
    return int(text)


def _not_a_count(name: str, text: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name} must be a number from 1 to {MOST_ITERATIONS}, not {text[:40]!r}", param=name
    )
