"""Serving until told to stop: the listening socket, signals and the graceful end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from pie_async.api.app import DEFAULT_MAX_BODY_BYTES, IN_FLIGHT, create_app, create_waiting_app
from pie_async.api.auth import ApiKeys
from pie_async.api.hosts import AllowedHosts
from pie_async.api.in_flight import InFlight
from pie_async.api.listener import DEFAULT_MAX_CONNECTIONS, Door
from pie_async.api.signals import listening
from pie_async.openai.backend import Backend

_FLUSH_S = 5.0
"""After answers were ended: time for their last bytes to leave."""

_log = logging.getLogger(__name__)


async def serve(
    engine: Backend,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    uds: Path | None = None,
    served_model_name: str | None = None,
    api_keys: ApiKeys | Iterable[str] = (),
    allowed_hosts: Iterable[str] = (),
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    max_connections: int = DEFAULT_MAX_CONNECTIONS,
    vllm_metrics: bool = False,
    tracer: Any = None,
    shutdown_timeout_s: float = 30.0,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a started engine until SIGTERM or SIGINT, then end gracefully and return.

    `Server` without a time before the engine; arguments and errors are its own.
    """
    async with Server(
        host,
        port,
        uds=uds,
        api_keys=api_keys,
        allowed_hosts=allowed_hosts,
        max_connections=max_connections,
    ) as server:
        await server.serve(
            engine,
            served_model_name=served_model_name,
            max_body_bytes=max_body_bytes,
            shutdown_timeout_s=shutdown_timeout_s,
            vllm_metrics=vllm_metrics,
            tracer=tracer,
            on_ready=on_ready,
        )


class Server:
    """Listens within its `async with` block: from before there is an engine until it is served.

    Before, every request is answered with 503 `engine_starting` and when to come again,
    `/health` and `/ready` too. The engine stays the caller's to start and close.

    Args:
        uds: a path to listen at instead of host and port; only this user may connect there.
        allowed_hosts: names, beside the machine's own, by which clients may call the server;
            see `AllowedHosts`. With none given and API keys, or at a path, any name does: no web
            page knows a key, or reaches a path.
        max_connections: further ones are refused.

    Raises:
        ConfigError: on entering the block, the host or port cannot be listened on.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        uds: Path | None = None,
        api_keys: ApiKeys | Iterable[str] = (),
        allowed_hosts: Iterable[str] = (),
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
    ) -> None:
        self._keys = ApiKeys.of(api_keys)
        self._hosts = _hosts(allowed_hosts, is_open=uds is None and not self._keys)
        self._door = Door(host, port, uds=uds, max_connections=max_connections)
        waiting = create_waiting_app(api_keys=self._keys, allowed_hosts=self._hosts)
        self._waiting = web.AppRunner(waiting, access_log=None, shutdown_timeout=_FLUSH_S)

    async def __aenter__(self) -> Self:
        await self._waiting.setup()
        self._door.lead_to(self._waiting)
        try:
            await self._door.open()
        except BaseException:
            await self._waiting.cleanup()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._door.close()
        await self._waiting.cleanup()

    @property
    def url(self) -> str:
        """Where it listens: http://host:port with the port that was picked, or unix:path."""
        return self._door.url

    async def serve(
        self,
        engine: Backend,
        *,
        served_model_name: str | None = None,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        shutdown_timeout_s: float = 30.0,
        vllm_metrics: bool = False,
        tracer: Any = None,
        on_ready: Callable[[str], None] | None = None,
    ) -> None:
        """Serve a started engine until SIGTERM or SIGINT, then end gracefully and return.

        The end: no new connections, 503 for new requests on old ones, `shutdown_timeout_s` for
        what is being answered (a second signal cuts it short), an error event for the rest. Must
        run in the main thread, where signals arrive; all servers of a process hear them.

        Args:
            vllm_metrics, tracer: as for `create_app`.
            on_ready: called with the server's URL once it admits requests; port 0 picks a free
                port, which the URL tells.
        """
        app = create_app(
            engine,
            served_model_name=served_model_name,
            api_keys=self._keys,
            allowed_hosts=self._hosts,
            max_body_bytes=max_body_bytes,
            vllm_metrics=vllm_metrics,
            tracer=tracer,
        )
        in_flight = app[IN_FLIGHT]
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=_FLUSH_S
        )
        with _stop_signals(in_flight) as stop:
            await runner.setup()
            try:
                self._door.lead_to(runner)
                if on_ready is not None:
                    on_ready(self._door.url)
                await self._waiting.cleanup()  # whoever was told to wait comes in anew
                await stop.wait()
                self._door.close()
                await _finish(in_flight, timeout_s=shutdown_timeout_s)
            finally:
                self._door.close()
                await runner.cleanup()


def _hosts(names: Iterable[str], *, is_open: bool) -> AllowedHosts | None:
    if names := tuple(names):
        return AllowedHosts(names)
    return AllowedHosts.local() if is_open else None


@contextmanager
def _stop_signals(in_flight: InFlight) -> Iterator[asyncio.Event]:
    """An event for the first signal; a second one ends all answers at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            in_flight.end()
        in_flight.drain()
        stop.set()

    with listening(on_signal, signal.SIGTERM, signal.SIGINT):
        yield stop


async def _finish(in_flight: InFlight, *, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await in_flight.wait_idle()
    except TimeoutError:
        _log.warning("ending requests that did not finish within %g s", timeout_s)
