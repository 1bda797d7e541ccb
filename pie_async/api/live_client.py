"""A client of a server's live feed and trace: for the terminal."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import aiohttp
import msgspec

from pie_async.api.client import ServerError, check, named_failures
from pie_async.live.frame import LiveFrame

_frames = msgspec.json.Decoder(LiveFrame)


class LiveClient:
    """Watches the server at `url`, with or without "/v1" at its end.

    Raises (all methods):
        ServerError: it cannot be reached, refuses, or has no such feed.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self._base = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def frames(self, *, most: int | None = None) -> AsyncGenerator[LiveFrame | str, None]:
        """Frames as they come; a text where there is no engine to look at just now."""
        query = "" if most is None else f"?frames={most}"
        with named_failures(self._base):
            async with self._session() as http, http.get(f"{self._base}/view{query}") as answer:
                await check(answer)
                kind = ""
                async for line in answer.content:
                    if line.startswith(b"event: "):
                        kind = line[7:].decode().strip()
                    elif line.startswith(b"data: "):
                        yield _read(kind, line[6:])

    async def trace(self, *, iterations: int) -> bytes:
        """The last iterations as a Chrome trace."""
        with named_failures(self._base):
            async with (
                self._session() as http,
                http.get(f"{self._base}/trace?iterations={iterations}") as answer,
            ):
                await check(answer)
                return await answer.read()

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0),
            read_bufsize=2**20,  # a frame is one line
        )


def _read(kind: str, data: bytes) -> LiveFrame | str:
    try:
        if kind == "frame":
            return _frames.decode(data)
        return str(msgspec.json.decode(data)["message"])
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise ServerError(f"the server's feed is another version's: {error}") from error
