"""Clients over bare sockets, well-behaved and not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

PATIENCE_S = 120.0
"""An answer that takes longer counts as lost."""
THINK_S = 8.0
"""Between two visits, on the average."""
LONGEST_STALL_S = 20.0
MUCH = {"max_tokens": 600, "logprobs": 5}
"""What stallers ask for: more than sockets hold."""
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends a reset."""
_FAMILIES = [
    " ".join(random.Random(n).choices(["to", "be", "or", "not", "king", "lord"], k=400))
    for n in range(4)
]


@dataclass
class Tally:
    """What all clients did and saw."""

    done: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)


@dataclass
class Connection:
    """An open one, and what was read of it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def line(self) -> bytes:
        """The next one, however long: what a slow reader missed comes in one piece. Empty: no more.

        The reader's own limit is small, so that who takes nothing holds nothing.
        """
        pieces: list[bytes] = []
        while not pieces or not pieces[-1].endswith(b"\n"):
            try:
                pieces.append(await self.reader.readuntil(b"\n"))
            except asyncio.LimitOverrunError as longer:
                pieces.append(await self.reader.readexactly(longer.consumed))
            except asyncio.IncompleteReadError as end:
                pieces.append(end.partial)
                break
        return b"".join(pieces)

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


class Client:
    """Does one thing after the other, each on a connection of its own."""

    def __init__(self, port: int, dice: random.Random, tally: Tally) -> None:
        self._port = port
        self._dice = dice
        self._tally = tally
        self._kinds: dict[str, tuple[int, Callable[[Connection], Awaitable[None]]]] = {
            "read": (4, self._read),
            "asked for one body": (2, self._ask),
            "cancelled": (3, self._cancel),
            "stalled and read on": (2, self._stall),
            "stalled and vanished": (1, self._stall_and_vanish),
            "vanished": (3, self._vanish),
            "sent half a request": (2, self._send_half),
            "connected only": (1, self._idle),
        }

    async def keep_on(self, ends_s: float) -> None:
        """Until then, with pauses."""
        await asyncio.sleep(self._dice.uniform(0.0, 5.0))
        while time.monotonic() < ends_s:
            await self.visit()
            await asyncio.sleep(self._dice.expovariate(1 / THINK_S))

    async def visit(self) -> None:
        """One connection."""
        names = list(self._kinds)
        (kind,) = self._dice.choices(names, [self._kinds[name][0] for name in names])
        try:
            async with asyncio.timeout(PATIENCE_S):
                connection = await self._connect()
        except (TimeoutError, OSError):
            # More came at once than the kernel keeps for a server: it did not hear of this one.
            self._tally.done["could not connect"] += 1
            return
        try:
            async with asyncio.timeout(PATIENCE_S):
                try:
                    await self._kinds[kind][1](connection)
                finally:
                    await connection.close()
        except TimeoutError:
            self._tally.wrong[f"{kind}: no answer within {PATIENCE_S:g} s"] += 1
        except (OSError, asyncio.IncompleteReadError) as error:
            self._tally.wrong[f"{kind}: {type(error).__name__}: {error}"] += 1
        else:
            self._tally.done[kind] += 1

    # --- what they do -----------------------------------------------------------------------

    async def _read(self, connection: Connection) -> None:
        tokens = await self._send(connection, is_streamed=True)
        if await self._has_answer(connection):
            await self._read_to_end(connection, tokens)

    async def _ask(self, connection: Connection) -> None:
        tokens = await self._send(connection, is_streamed=False)
        if await self._has_answer(connection):
            body = json.loads(await connection.reader.read(2**20))
            self._check(body.get("usage"), tokens)

    async def _cancel(self, connection: Connection) -> None:
        await self._send(connection, is_streamed=True)
        if await self._has_answer(connection):
            await self._read_some(connection)

    async def _stall(self, connection: Connection) -> None:
        tokens = await self._send(connection, is_streamed=True, **MUCH)
        if await self._has_answer(connection):
            await connection.reader.readuntil(b"data: {")
            await connection.line()
            await asyncio.sleep(self._dice.uniform(0.0, LONGEST_STALL_S))
            await self._read_to_end(connection, tokens)

    async def _stall_and_vanish(self, connection: Connection) -> None:
        await self._send(connection, is_streamed=True, **MUCH)
        if await self._has_answer(connection):
            await connection.reader.readuntil(b"data: {")
            await asyncio.sleep(self._dice.uniform(0.0, LONGEST_STALL_S))
        connection.reset()

    async def _vanish(self, connection: Connection) -> None:
        await self._send(connection, is_streamed=self._dice.random() < 0.5)
        await asyncio.sleep(self._dice.expovariate(1 / 0.3))
        connection.reset()

    async def _send_half(self, connection: Connection) -> None:
        request, _ = self._request(is_streamed=True)
        connection.writer.write(request[: self._dice.randrange(1, len(request))])
        await asyncio.sleep(self._dice.uniform(0.0, 2.0))
        if self._dice.random() < 0.5:
            connection.reset()

    async def _idle(self, _connection: Connection) -> None:
        await asyncio.sleep(self._dice.uniform(0.0, 5.0))

    # --- how --------------------------------------------------------------------------------

    async def _connect(self) -> Connection:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        except BaseException:
            sock.close()
            raise
        return Connection(*await asyncio.open_connection(sock=sock, limit=2**14))

    def _request(self, *, is_streamed: bool, **more: object) -> tuple[bytes, int]:
        dice = self._dice
        tokens, n = dice.choice([5, 20, 60, 150]), dice.choice([1, 1, 1, 2])
        prompt = dice.choice(_FAMILIES)[: dice.randrange(1, 800)]
        body = {
            "prompt": prompt, "max_tokens": tokens, "n": n, "ignore_eos": True,
            "stream": is_streamed, "seed": dice.randrange(1000), **more,
        }  # fmt: skip
        if is_streamed:
            body["stream_options"] = {"include_usage": True}
        payload = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
            "Content-Type: application/json\r\nConnection: close\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        )
        return head.encode() + payload, int(str(body["max_tokens"])) * n

    async def _send(self, connection: Connection, *, is_streamed: bool, **more: object) -> int:
        """The output tokens that were asked for."""
        request, tokens = self._request(is_streamed=is_streamed, **more)
        connection.writer.write(request)
        return tokens

    async def _has_answer(self, connection: Connection) -> bool:
        """Read the head; whether the request was admitted."""
        head = (await connection.reader.readuntil(b"\r\n\r\n")).decode()
        status = head.split()[1]
        self._tally.statuses[status] += 1
        if status == "429":
            after_s = float(head.lower().split("retry-after: ")[1].split("\r\n")[0])
            await asyncio.sleep(min(after_s, 5.0) * self._dice.uniform(0.5, 1.5))
        elif status != "200":
            self._tally.wrong[f"status {status}"] += 1
        return status == "200"

    async def _read_some(self, connection: Connection) -> None:
        for _ in range(self._dice.randrange(1, 40)):
            if not await connection.line():
                return

    async def _read_to_end(self, connection: Connection, tokens: int) -> None:
        usage, last = None, b""
        while line := await connection.line():
            if line.startswith(b"data: "):
                last = line.strip()
                if b'"usage":{' in line:
                    usage = json.loads(line[6:])["usage"]
        if last != b"data: [DONE]":
            self._tally.wrong[f"a stream ended with {last[:200]!r}"] += 1
        else:
            self._check(usage, tokens)

    def _check(self, usage: dict[str, int] | None, tokens: int) -> None:
        if usage is None or usage["completion_tokens"] != tokens:
            self._tally.wrong[f"{tokens} tokens were asked for: {usage}"] += 1
