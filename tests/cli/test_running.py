"""What commands share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pie_async.cli.running import begun


class Engine:
    """Takes a second to start, and may fail to."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.story: list[str] = []
        self._failure = failure

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            self.story.append("cancelled")
            raise
        if self._failure is not None:
            raise self._failure
        self.story.append("started")
        try:
            yield "engine"
        finally:
            self.story.append("closed")


async def test_what_was_begun_is_there_when_it_is_waited_for_and_left_with_the_block() -> None:
    engine = Engine()
    async with begun(engine.running()) as entering:
        engine.story.append("meanwhile")
        assert await entering == "engine"
        engine.story.append("used")
    assert engine.story == ["meanwhile", "started", "used", "closed"]


async def test_what_fails_meanwhile_ends_what_was_begun() -> None:
    engine = Engine()

    async def listen() -> None:
        async with begun(engine.running()):
            await asyncio.sleep(0.5)
            raise ValueError("the port is in use")

    with pytest.raises(ValueError, match="port"):
        await listen()
    assert engine.story == ["cancelled"]


async def test_a_failure_to_start_is_raised_where_it_is_waited_for() -> None:
    engine = Engine(failure=ValueError("no such model"))

    async def wait() -> None:
        async with begun(engine.running()) as entering:
            await entering

    with pytest.raises(ValueError, match="no such model"):
        await wait()
    assert engine.story == []
