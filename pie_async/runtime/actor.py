"""One coroutine, one mailbox, and follow-ups that cannot outlive it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from pie_async.runtime.mailbox import Mailbox

M = TypeVar("M")

# Actors handle mail without suspending; after this many in a row the loop gets a turn.
MAIL_PER_TURN = 32

Observer = Callable[[str, Any], None]
"""Told (actor name, message) before each message is handled."""


class Actor(Generic[M]):
    """Owner of one resource, reached only through `mailbox`.

    `handle` is synchronous, so it cannot be cancelled halfway; what has to wait, waits in a
    follow-up. An exception in either ends the actor, and with it the engine.
    """

    def __init__(self, name: str, *, capacity: int, observer: Observer | None = None) -> None:
        self.name = name
        self.mailbox: Mailbox[M] = Mailbox(name, capacity)
        self._observer = observer
        self._group: asyncio.TaskGroup | None = None

    def handle(self, mail: M) -> None:
        """React to one message."""
        raise NotImplementedError

    def follow_up(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` beside the mailbox. The actor ends only after its follow-ups."""
        assert self._group is not None, "follow_up() outside run()"
        self._group.create_task(work, name=f"{self.name}.{what}")

    async def run(self) -> None:
        """Handle mail until the mailbox is closed and empty and all follow-ups are done.

        Raises:
            ExceptionGroup: a handler or a follow-up failed.
        """
        async with asyncio.TaskGroup() as group:
            self._group = group
            handled = 0
            while (mail := await self.mailbox.receive()) is not None:
                if self._observer is not None:
                    self._observer(self.name, mail)
                self.handle(mail)
                handled += 1
                if handled % MAIL_PER_TURN == 0:
                    await asyncio.sleep(0)
