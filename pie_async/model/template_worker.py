"""The child that `ConfinedTemplate` renders in: one template, one conversation at a time."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from pie_async.errors import InvalidRequest, ModelError
from pie_async.model.chat_template import ChatTemplate

MEMORY_BYTES = 512 * 2**20
"""What rendering may take beyond what the interpreter has. A conversation of 4 MiB takes 40 MiB
where a template copies it ten times."""
CPU_S = 2.0
"""What one rendering may take of a core; fuel runs out after less, but does not count loops inside
of filters."""

_LENGTH_BYTES = 4


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """The first message: a template, as `ChatTemplate` takes it."""

    source: str
    variables: dict[str, str]
    path: str


class Render(msgspec.Struct, frozen=True, kw_only=True):
    """Every other message there."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    tools: list[dict[str, Any]] | None = None
    options: dict[str, bool] = {}


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to either."""

    text: str | None = None
    refusal: str = ""
    """What is wrong, if there is no text."""


def main(fd: int) -> None:
    """Answer until the other end hangs up."""
    with socket.socket(fileno=fd) as connection:
        opening = receive_frame(connection)
        if opening is None:
            return
        command = msgspec.msgpack.decode(opening, type=Open)
        _limit_memory()
        with _limited_time():
            template = _compile(connection, command)
        commands = msgspec.msgpack.Decoder(Render)
        while (frame := receive_frame(connection)) is not None:
            with _limited_time():
                outcome = _render(template, commands.decode(frame))
            send_frame(connection, outcome)


def _compile(connection: socket.socket, command: Open) -> ChatTemplate:
    try:
        template = ChatTemplate(command.source, command.variables, path=Path(command.path))
    except ModelError as error:
        send_frame(connection, Outcome(refusal=str(error)))
        sys.exit()
    send_frame(connection, Outcome(text=""))
    return template


def _render(template: ChatTemplate, command: Render) -> Outcome:
    try:
        text = template.render(
            command.messages,
            add_generation_prompt=command.add_generation_prompt,
            tools=command.tools,
            options=command.options,
        )
        return Outcome(text=text)
    except InvalidRequest as refusal:
        return Outcome(refusal=str(refusal))


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    """Within it, using more of a core than `CPU_S` ends the process by a signal."""
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    """An allocation beyond it fails, on which minijinja aborts."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def send_frame(connection: socket.socket, message: msgspec.Struct) -> None:
    """A length (4 bytes, little endian) and the message as msgpack."""
    frame = msgspec.msgpack.encode(message)
    connection.sendall(len(frame).to_bytes(_LENGTH_BYTES, "little"))
    connection.sendall(frame)


def receive_frame(connection: socket.socket) -> bytearray | None:
    """The bytes of the next message; None when the other end is gone."""
    length = _receive(connection, _LENGTH_BYTES)
    return None if length is None else _receive(connection, int.from_bytes(length, "little"))


def _receive(connection: socket.socket, num_bytes: int) -> bytearray | None:
    data = bytearray(num_bytes)
    rest = memoryview(data)
    while rest:
        count = connection.recv_into(rest)
        if not count:
            return None
        rest = rest[count:]
    return data
