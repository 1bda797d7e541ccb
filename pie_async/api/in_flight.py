"""Which requests are being answered, so that a shutdown can wait for them and then end them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from pie_async.errors import EngineStopped
from pie_async.openai.answer import Answer


class InFlight:
    """Admits requests until it drains, and knows when the last one has been answered."""

    def __init__(self) -> None:
        self._admitted = 0
        self._answers: set[Answer] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_ended = False
        self.is_draining = False

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Covers a request from its first byte to its answer's last.

        Raises:
            EngineStopped: draining; nothing is admitted any more.
        """
        if self.is_draining:
            raise EngineStopped("the server is shutting down; try again later or elsewhere")
        self._admitted += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._admitted -= 1
            if self._admitted == 0:
                self._idle.set()

    @contextmanager
    def answering(self, answer: Answer) -> Iterator[None]:
        """Within it, `end` reaches the answer."""
        self._answers.add(answer)
        if self._is_ended:
            answer.fail(_ended())
        try:
            yield
        finally:
            self._answers.discard(answer)

    def drain(self) -> None:
        """Admit nothing more."""
        self.is_draining = True

    async def wait_idle(self) -> None:
        """Return when nothing that was admitted is unanswered."""
        await self._idle.wait()

    def end(self) -> None:
        """End every answer with an error that tells the client to try again."""
        self.drain()
        self._is_ended = True
        for answer in self._answers:
            answer.fail(_ended())


def _ended() -> EngineStopped:
    return EngineStopped("the server shut down before the request was finished; try again")
