"""Serving until told to stop: the listening socket, signals and the graceful end."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from pie_async.api.app import DEFAULT_MAX_BODY_BYTES, IN_FLIGHT, create_app
from pie_async.api.auth import ApiKeys
from pie_async.api.hosts import AllowedHosts
from pie_async.api.in_flight import InFlight
from pie_async.api.listener import DEFAULT_MAX_CONNECTIONS, LimitedSite
from pie_async.errors import ConfigError
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

    The end: no new connections, 503 for new requests on old ones, `shutdown_timeout_s` for
    what is being answered (a second signal cuts it short), an error event for the rest. The
    engine stays the caller's to close. Must run in the main thread, where signals arrive.

    Args:
        uds: a path to listen at instead of host and port; only this user may connect there.
        allowed_hosts: names, beside the machine's own, by which clients may call the server;
            see `AllowedHosts`. With none given and API keys, or at a path, any name does: no web
            page knows a key, or reaches a path.
        max_connections: further ones are refused.
        vllm_metrics, tracer: as for `create_app`.
        on_ready: called with the server's URL once it accepts connections; port 0 picks a
            free port, which the URL tells.

    Raises:
        ConfigError: the host or port cannot be listened on.
    """
    api_keys = ApiKeys.of(api_keys)
    app = create_app(
        engine,
        served_model_name=served_model_name,
        api_keys=api_keys,
        allowed_hosts=_hosts(allowed_hosts, is_open=uds is None and not api_keys),
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
            site = LimitedSite(runner, host, port, uds=uds, max_connections=max_connections)
            await _listen(site, host, port)
            if on_ready is not None:
                on_ready(_url(runner) if uds is None else site.name)
            await stop.wait()
            await site.stop()
            await _finish(in_flight, timeout_s=shutdown_timeout_s)
        finally:
            await runner.cleanup()


def _hosts(names: Iterable[str], *, is_open: bool) -> AllowedHosts | None:
    if names := tuple(names):
        return AllowedHosts(names)
    return AllowedHosts.local() if is_open else None


async def _listen(site: LimitedSite, host: str, port: int) -> None:
    try:
        await site.start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use; choose another with --port", option="port"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(
                f"port {port} may not be used by this user; choose one above 1023 with --port",
                option="port",
            ) from error
        raise ConfigError(
            f"cannot listen on {host}: {error.strerror or error}; choose an address of this "
            "machine with --host",
            option="host",
        ) from error


@contextmanager
def _stop_signals(in_flight: InFlight) -> Iterator[asyncio.Event]:
    """An event for the first signal; a second one ends all answers at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            in_flight.end()
        in_flight.drain()
        stop.set()

    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _finish(in_flight: InFlight, *, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await in_flight.wait_idle()
    except TimeoutError:
        _log.warning("ending requests that did not finish within %g s", timeout_s)


def _url(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
