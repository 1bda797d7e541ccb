"""A thread that bites what stands still, and nothing else; its report is bounded."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest

from pie_async.runtime import report
from pie_async.runtime.mailbox import Mailbox
from pie_async.runtime.report import write_report
from pie_async.runtime.watchdog import FIRST_TIMES, TICKS, Issued, Mail, Turns, Watchdog

LATEST_TICK = TICKS + 1
"""The first tick sees a position, `TICKS` more that it does not change."""


def a_watchdog(*watched) -> Watchdog:
    return Watchdog(asyncio.get_running_loop(), watched, within_s=8.0, bite=lambda _: None)


async def ticks(watchdog: Watchdog, most: int = 2000) -> tuple[int, str] | None:
    """Tick on a loop that turns until something is stuck: (ticks, its name)."""
    for number in range(1, most + 1):
        if (stuck := watchdog.tick()) is not None:
            return number, stuck.name
        await asyncio.sleep(0)
    return None


async def test_work_that_ends_in_time_is_left_alone_and_work_that_does_not_is_bitten_once():
    stream = Issued("compute stream")
    watchdog = a_watchdog(stream)
    for number in range(50):  # two in flight, each for longer than the one before
        ended = asyncio.get_running_loop().create_future()
        stream.add(f"iteration {number}", ended)
        assert await ticks(watchdog, most=TICKS) is None
        ended.set_result(None)
        await asyncio.sleep(0)
    assert await ticks(watchdog) is None  # nothing to do
    stream.add("iteration 50", asyncio.get_running_loop().create_future())
    assert await ticks(watchdog) == (LATEST_TICK, "compute stream")
    assert "iteration 50 issued and not completed" in stream.tell()
    assert await ticks(watchdog) is None


async def test_the_first_work_of_a_stream_may_be_compiled_first():
    stream = Issued("compute stream")
    stream.add("iteration 1", asyncio.get_running_loop().create_future())
    assert await ticks(a_watchdog(stream)) == (FIRST_TIMES * TICKS + 1, "compute stream")


async def test_work_that_failed_or_was_cancelled_has_ended():
    stream = Issued("d2h stream")
    failed, cancelled = (asyncio.get_running_loop().create_future() for _ in range(2))
    stream.add("a", failed)
    stream.add("b", cancelled)
    failed.set_exception(RuntimeError())
    failed.exception()
    cancelled.cancel()
    await asyncio.sleep(0)
    assert stream.position() is None


async def test_mail_that_nobody_reads_is_noticed_and_mail_that_is_read_is_not():
    mailbox: Mailbox[int] = Mailbox("scheduler", capacity=200)
    watchdog = a_watchdog(Mail(mailbox))
    for number in range(100):
        mailbox.post(number)
    for _ in range(3 * TICKS):
        await mailbox.receive()
        assert await ticks(watchdog, most=1) is None  # never empty, always read
    assert await ticks(watchdog) == (LATEST_TICK - 1, "actor scheduler")


async def test_a_loop_that_does_not_turn_is_named_instead_of_what_waits_for_it():
    stream = Issued("compute stream")
    ended = asyncio.get_running_loop().create_future()
    stream.add("iteration 1", ended)
    ended.set_result(None)
    await asyncio.sleep(0)
    stream.add("iteration 2", asyncio.get_running_loop().create_future())
    watchdog = a_watchdog(stream)
    stuck = [watchdog.tick() for _ in range(5 * TICKS)]  # without a turn in between
    named = [one for one in stuck if one is not None]
    assert [type(one) for one in named] == [Turns]
    await asyncio.sleep(0)
    assert await ticks(watchdog, most=TICKS - 1) is None  # the stream gets all its time


@pytest.mark.realtime
async def test_the_thread_bites_while_the_loop_is_blocked():
    bitten = threading.Event()
    watchdog = Watchdog(
        asyncio.get_running_loop(), (), within_s=0.08, bite=lambda one: bitten.set()
    )
    watchdog.start()
    began_s = time.monotonic()
    assert bitten.wait(timeout=5.0)  # blocks the loop, which is the point
    assert time.monotonic() - began_s >= 0.08
    watchdog.close()


@pytest.mark.realtime
async def test_a_report_tells_stacks_tasks_and_what_it_is_given(tmp_path):
    async def wait_inside() -> None:
        await asyncio.sleep(60)

    task = asyncio.create_task(wait_inside(), name="somebody")
    await asyncio.sleep(0)
    sections = {"fine": lambda: "all is well", "broken": lambda: str(1 / 0)}
    loop = asyncio.get_running_loop()
    path = await asyncio.to_thread(write_report, str(tmp_path / "new"), "it hung", loop, sections)
    task.cancel()
    text = path.read_text()
    assert text.startswith("it hung\n")
    for part in (
        "MainThread", "test_watchdog.py", "somebody", "wait_inside", "all is well",
        "could not be told: ZeroDivisionError",
    ):  # fmt: skip
        assert part in text, part
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.realtime
async def test_a_report_that_cannot_be_written_costs_a_line_and_no_time(
    tmp_path, monkeypatch, caplog
):
    loop = asyncio.get_running_loop()
    (tmp_path / "file").write_text("")
    assert write_report(str(tmp_path / "file"), "it hung", loop, {}) is None
    assert "it hung; no report: " in caplog.text

    monkeypatch.setattr(report.os, "open", lambda *_: _open_full())
    assert write_report(str(tmp_path), "it hung again", loop, {}) is None
    assert "No space left" in caplog.text
    monkeypatch.undo()

    monkeypatch.setattr(report, "WRITE_S", 0.05)
    forever = threading.Event()
    began_s = time.monotonic()
    write_report(str(tmp_path), "locked", loop, {"locked": lambda: str(forever.wait(3.0))})
    assert time.monotonic() - began_s < 1.0
    forever.set()


_os_open = os.open


def _open_full() -> int:
    return _os_open("/dev/full", os.O_WRONLY)


@pytest.mark.realtime
async def test_old_reports_make_room(tmp_path):
    loop = asyncio.get_running_loop()
    for number in range(report.MOST_REPORTS + 3):
        (tmp_path / f"pie-report-2020010{number:03}.txt").write_text("")
    newest = write_report(str(tmp_path), "it hung", loop, {})
    left = sorted(tmp_path.iterdir())
    assert len(left) == report.MOST_REPORTS
    assert left[-1] == newest
