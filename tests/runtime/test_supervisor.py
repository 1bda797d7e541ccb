"""All for one: they start together, stop together, and the device is drained last."""

from __future__ import annotations

import asyncio

import pytest

from pie_async.errors import DeviceFault, EngineStopped
from pie_async.runtime.actor import Actor
from pie_async.runtime.supervisor import Supervisor


class Device:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    async def drain(self) -> None:
        await asyncio.sleep(1.0)
        self.log.append("drained")


class Worker(Actor[str]):
    """Fails on "boom"; hands "pass" on to `next_one` after a while."""

    def __init__(self, name: str, log: list[str], next_one: Worker | None = None) -> None:
        super().__init__(name, capacity=8)
        self._log = log
        self._next = next_one

    def handle(self, mail: str) -> None:
        self._log.append(f"{self.name} {mail}")
        if mail == "boom":
            raise DeviceFault("the link is gone")
        if self._next is not None:
            self.follow_up("hand_on", self._hand_on(self._next, mail))

    async def _hand_on(self, other: Worker, mail: str) -> None:
        await asyncio.sleep(5.0)
        other.mailbox.post(mail)

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            self._log.append(f"{self.name} ended")


@pytest.fixture
def log() -> list[str]:
    return []


async def test_when_one_fails_all_stop_and_the_error_says_what_happened(log: list[str]):
    reader, writer = Worker("reader", log), Worker("writer", log)
    supervisor = Supervisor([reader, writer], Device(log))
    running = asyncio.create_task(supervisor.run())
    await asyncio.sleep(1.0)
    writer.mailbox.post("boom")
    with pytest.raises(EngineStopped, match="DeviceFault: the link is gone") as caught:
        await running
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert {"reader ended", "writer ended"} <= set(log)
    assert reader.mailbox.is_closed
    assert writer.mailbox.is_closed


async def test_the_device_is_drained_after_the_last_actor_also_on_failure(log: list[str]):
    worker = Worker("worker", log)
    supervisor = Supervisor([worker], Device(log))
    worker.mailbox.post("boom")
    with pytest.raises(EngineStopped):
        await supervisor.run()
    assert log == ["worker boom", "worker ended", "drained"]


async def test_closing_stops_producers_first_and_waits_for_what_they_hand_on(log: list[str]):
    reader = Worker("reader", log)
    writer = Worker("writer", log, reader)
    supervisor = Supervisor([reader, writer], Device(log))
    running = asyncio.create_task(supervisor.run())
    await asyncio.sleep(0)
    writer.mailbox.post("last words")
    await supervisor.close()
    await running
    assert log.index("writer ended") < log.index("reader ended")
    assert log.index("reader last words") < log.index("reader ended")
    assert log[-1] == "drained"


async def test_closing_twice_does_nothing(log: list[str]):
    supervisor = Supervisor([Worker("worker", log)], Device(log))
    running = asyncio.create_task(supervisor.run())
    await asyncio.sleep(0)
    await supervisor.close()
    await supervisor.close()
    await running
    assert log == ["worker ended", "drained"]


async def test_a_cancelled_supervisor_stops_its_actors_and_drains_the_device(log: list[str]):
    supervisor = Supervisor([Worker("worker", log)], Device(log))
    running = asyncio.create_task(supervisor.run())
    await asyncio.sleep(1.0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert log == ["worker ended", "drained"]
