"""The listening socket: TCP or Unix, how many connections it holds and for how long idle ones."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from pathlib import Path
from typing import cast

from aiohttp import web

from pie_async.errors import ConfigError, InvalidRequest, Overloaded
from pie_async.openai.errors import ErrorReply, error_reply

DEFAULT_MAX_CONNECTIONS = 4096
HEAD_S = 20.0
"""How long a connection may take from its first byte, or from nothing, to a whole request head."""
IDLE_S = 75.0
"""How long a connection is kept between requests: longer than proxies keep theirs."""

_BACKLOG = 1024
_OWNER_ONLY = 0o600
_log = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    """aiohttp's connection with a limit on the time a head may take, and errors in JSON."""

    def __init__(self, server: web.Server, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # none, as in AppRunner
            keepalive_timeout=IDLE_S,
        )
        self._deadline: asyncio.TimerHandle | None = None
        self._is_busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._is_busy:
            self._expect_head()
        super().data_received(data)

    def begin(self) -> None:
        """A request's head is whole: it is being answered."""
        self._is_busy = True
        self._stop_expecting()

    def end(self) -> None:
        """It has been answered."""
        self._is_busy = False

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP: answered like every other bad request. Anybody can send it, so the log
        is not filled with it."""
        del message
        if status != 400 or request.writer.output_size > 0:
            return super().handle_error(request, status, exc)
        _log.debug("not HTTP: %s", exc)
        reply = error_reply(
            InvalidRequest("the request is not valid HTTP/1.1, or its head too long")
        )
        response = web.Response(status=400, body=reply.body, content_type="application/json")
        response.force_close()
        return response

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().call_later(HEAD_S, self.force_close)

    def _stop_expecting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Door:
    """A listening socket, of a port or a path, that holds at most so many connections.

    Who answers behind it may change while it is open: connections go to the application that
    it leads to when they come.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        uds: Path | None = None,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
    ) -> None:
        """`uds`: a path to listen at instead of host and port."""
        self._host, self._port = host, port
        self._uds = uds
        self._max_connections = max_connections
        self._answering: web.Server | None = None
        self._listening: asyncio.AbstractServer | None = None

    @property
    def url(self) -> str:
        """Of the open door: where it is, with the port that was picked."""
        if self._uds is not None:
            return f"unix:{self._uds}"
        listening = cast("asyncio.Server", self._listening)  # uvloop's is no subclass
        host, port = listening.sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def lead_to(self, runner: web.AppRunner) -> None:
        """Connections that come from now on are this application's, which has been set up."""
        self._answering = runner.server

    async def open(self) -> None:
        """Listen. Raises ConfigError if that cannot be."""
        loop = asyncio.get_running_loop()
        if self._uds is not None:
            self._listening = await loop.create_unix_server(
                self._connect, sock=_bind(self._uds), backlog=_BACKLOG
            )
            return
        try:
            self._listening = await loop.create_server(
                self._connect, self._host, self._port, backlog=_BACKLOG
            )
        except OSError as error:
            raise _cannot_listen(self._host, self._port, error) from error

    def close(self) -> None:
        """Listen no more; connections stay. Calling it again does nothing."""
        if self._listening is None:
            return
        self._listening.close()
        self._listening = None
        if self._uds is not None:
            self._uds.unlink(missing_ok=True)

    def _connect(self) -> asyncio.Protocol:
        server = self._answering
        assert server is not None
        if len(server.connections) >= self._max_connections:
            return _Refusal()
        return Connection(server, loop=asyncio.get_running_loop())


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {port} of {host} is in use; choose another with --port", option="port"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(
            f"port {port} may not be used by this user; choose one above 1023 with --port",
            option="port",
        )
    return ConfigError(
        f"cannot listen on {host}: {error.strerror or error}; choose an address of this "
        "machine with --host",
        option="host",
    )


class _Refusal(asyncio.Protocol):
    """Of a connection too many: told so, unasked, and closed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connected = cast("asyncio.Transport", transport)  # uvloop's are no subclass
        connected.write(_as_http(error_reply(Overloaded("too many connections are open"))))
        connected.close()


def _as_http(reply: ErrorReply) -> bytes:
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(reply.body)),
        "Connection": "close",
        **reply.headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {reply.status} Too Many Requests\r\n{head}\r\n".encode() + reply.body


def _bind(path: Path) -> socket.socket:
    """A socket at a path that only this user may connect to, from its first moment.

    What a server that was killed left there is replaced.
    """
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listening.fileno(), _OWNER_ONLY)  # Linux gives the path the socket's mode
        listening.bind(str(path))
        path.chmod(_OWNER_ONLY)
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen at {path}: {reason}; choose another path with --uds", option="uds"
        ) from error
    listening.setblocking(False)
    return listening


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(
                f"{path} is there and is no socket; choose another path with --uds", option="uds"
            )
    except OSError:
        return  # nothing there, or binding will say what is wrong
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError:
            return
    raise ConfigError(f"{path} is in use; choose another path with --uds", option="uds")
