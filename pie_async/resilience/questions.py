"""What the front asks the engine's process, and waits to be told."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from pie_async.errors import EngineStopped
from pie_async.messages import Message
from pie_async.resilience.process import EngineProcess
from pie_async.resilience.wire import Looked, Recalled


class Questions:
    """Open questions to one process after the other; each is answered or fails with its process."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, asyncio.Future[Any]] = {}

    async def ask(self, process: EngineProcess, question: Callable[[int], Message]) -> Any:
        """The answer to `question`, which is given its number.

        Raises:
            EngineStopped: the process ended before it answered.
        """
        number = next(self._numbers)
        answer = self._open[number] = asyncio.get_running_loop().create_future()
        try:
            process.post(question(number))
            return await answer
        finally:
            del self._open[number]

    def answered(self, message: Looked | Recalled) -> None:
        """An answer came; nobody may wait for it any more."""
        answer = self._open.get(message.number)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def fail(self) -> None:
        """The process has ended."""
        for answer in self._open.values():
            if not answer.done():
                answer.set_exception(EngineStopped("the engine died while it was asked"))
