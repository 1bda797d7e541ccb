"""A bounded, typed queue between actors of one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from pie_async.errors import MailboxClosed, MailboxFull

M = TypeVar("M")


class Mailbox(Generic[M]):
    """First in, first out, for one reader and any number of writers.

    Commands wait for room (`send`), so a busy actor slows its callers down. Facts never
    wait (`post`): their number is bounded by the commands in flight, so a full mailbox is
    a bug and raises.
    """

    def __init__(self, name: str, capacity: int) -> None:
        self.name = name
        self.capacity = capacity
        self.num_read = 0
        """Messages that its reader took."""
        self._mail: deque[M] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._writers: deque[asyncio.Future[None]] = deque()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._mail)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    async def send(self, message: M) -> None:
        """Put a message in, waiting while the mailbox is full.

        Raises:
            MailboxClosed: before or while waiting.
        """
        while len(self._mail) >= self.capacity and not self._is_closed:
            room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._writers.append(room)
            try:
                await room
            except asyncio.CancelledError:
                # The room this writer was promised goes to the next one.
                if room.done() and not room.cancelled():
                    self._wake_writer()
                raise
        self.post(message)

    def post(self, message: M) -> None:
        """Put a message in without waiting.

        Raises:
            MailboxClosed: the reader has stopped.
            MailboxFull: a promised bound was broken.
        """
        if self._is_closed:
            raise MailboxClosed(f"the {self.name} mailbox is closed")
        if len(self._mail) >= self.capacity:
            raise MailboxFull(f"the {self.name} mailbox already holds {self.capacity} messages")
        self._mail.append(message)
        self._wake_reader()

    async def receive(self) -> M | None:
        """The next message; None once the mailbox is closed and empty."""
        while not self._mail:
            if self._is_closed:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        message = self._mail.popleft()
        self.num_read += 1
        self._wake_writer()
        return message

    def drain(self) -> list[M]:
        """Take all messages at once, e.g. in a test."""
        mail = list(self._mail)
        self._mail.clear()
        while self._writers:
            self._wake_writer()
        return mail

    def close(self) -> None:
        """Refuse new messages; those inside are still read."""
        self._is_closed = True
        self._wake_reader()
        while self._writers:
            self._wake_writer()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _wake_writer(self) -> None:
        while self._writers:
            room = self._writers.popleft()
            if not room.done():
                room.set_result(None)
                return
