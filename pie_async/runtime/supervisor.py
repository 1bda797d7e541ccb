"""Starts the actors together, stops them together, drains the device last."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from pie_async.errors import EngineStopped
from pie_async.runtime.actor import Actor

DRAIN_S = 30.0
"""A device that takes longer to finish what was issued is given up."""


class Drainable(Protocol):
    async def drain(self) -> None:
        """Return when all issued work is done. Never raises."""


class Supervisor:
    """Runs the actors together: when one fails, all stop.

    One for all, and no restart in place: actors share the KV arenas, so a dead one leaves
    copies in flight that only a drained device settles.
    """

    def __init__(self, actors: Sequence[Actor[Any]], device: Drainable) -> None:
        self._actors = actors  # consumers first, so no fact lacks a reader
        self._device = device
        self._tasks: list[asyncio.Task[None]] = []
        self.is_drained = False
        """Whether everything issued is over, so that memory can be freed."""

    async def run(self) -> None:
        """Return when every actor has stopped and the device is idle, or given up.

        Raises:
            EngineStopped: an actor failed; `__cause__` holds the errors.
        """
        try:
            async with asyncio.TaskGroup() as group:
                self._tasks = [
                    group.create_task(actor.run(), name=actor.name) for actor in self._actors
                ]
        except ExceptionGroup as crash:
            first = _first_leaf(crash)
            raise EngineStopped(f"the engine stopped: {type(first).__name__}: {first}") from crash
        finally:
            for actor in self._actors:
                actor.mailbox.close()
            drained = asyncio.ensure_future(self._device.drain())
            try:
                await asyncio.wait([drained], timeout=DRAIN_S)
            finally:
                self.is_drained = drained.done()
                drained.cancel()

    async def close(self) -> None:
        """Stop the actors, producers first, each when the ones before it have ended.

        They should be idle: a fact to an actor that has stopped is an error.
        """
        for actor, task in zip(reversed(self._actors), reversed(self._tasks), strict=True):
            actor.mailbox.close()
            await asyncio.wait([task])


def _first_leaf(group: BaseExceptionGroup[Any]) -> BaseException:
    first = group.exceptions[0]
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
