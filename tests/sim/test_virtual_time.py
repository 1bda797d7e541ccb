"""The virtual-time loop: its clock, its idea of a deadlock, and threads that wake it."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import uvloop

from pie_async.runtime.virtual_time import Deadlock, VirtualTimeLoop


async def test_tests_run_on_virtual_time_unless_marked():
    assert isinstance(asyncio.get_running_loop(), VirtualTimeLoop)


@pytest.mark.realtime
async def test_realtime_tests_run_on_uvloop():
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)


async def test_a_week_of_sleep_takes_no_time():
    began = time.monotonic()
    await asyncio.sleep(7 * 24 * 3600)
    assert asyncio.get_running_loop().time() == pytest.approx(7 * 24 * 3600)
    assert time.monotonic() - began < 5


async def test_timers_fire_in_order_of_their_deadlines():
    loop = asyncio.get_running_loop()
    fired: list[tuple[str, float]] = []
    for name, at in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        loop.call_at(at, lambda name=name: fired.append((name, loop.time())))
    await asyncio.sleep(10)
    assert fired == [("a", 1.0), ("b", 2.0), ("c", 3.0)]


def test_a_deadlock_names_the_waiting_task_and_its_line():
    async def waits_forever() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        await asyncio.create_task(waits_forever(), name="stuck")

    with (
        pytest.raises(Deadlock, match=r"stuck at .*waits_forever \(.*test_virtual_time\.py:\d+"),
        asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(deadlock_after_s=0)) as runner,
    ):
        runner.run(main())


async def test_a_timeout_never_wins_against_an_executor_job():
    release = threading.Event()
    threading.Timer(0.02, release.set).start()
    async with asyncio.timeout(1e-3):
        assert await asyncio.to_thread(release.wait, 10)
    assert asyncio.get_running_loop().time() == 0.0


async def test_a_cancelled_wait_for_a_job_lets_time_go_on():
    release = threading.Event()
    waiting = asyncio.ensure_future(asyncio.to_thread(release.wait, 10))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(5)
    assert asyncio.get_running_loop().time() == 5.0
    release.set()


async def test_time_stands_still_while_held_for_a_thread():
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    woken = asyncio.Event()
    thread = threading.Timer(0.02, loop.call_soon_threadsafe, (woken.set,))
    with loop.holding_time():
        thread.start()
        async with asyncio.timeout(1e-3):
            await woken.wait()
    thread.join()
    assert loop.time() == 0.0


async def test_an_unannounced_thread_is_no_deadlock():
    woken = asyncio.Event()
    thread = threading.Timer(0.02, asyncio.get_running_loop().call_soon_threadsafe, (woken.set,))
    thread.start()
    await woken.wait()
    thread.join()


async def test_sockets_work_on_virtual_time():
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)
        writer.write(await reader.readline())
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"hello\n")
        assert await reader.readline() == b"hello\n"
        writer.close()
        await writer.wait_closed()
