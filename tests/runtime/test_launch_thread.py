"""The launch thread: in order, to the end, and at once."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable

import pytest

from pie_async.runtime.launch_thread import MOST_WAIT_S, LaunchThread


def test_work_is_done_in_order_and_to_the_end_in_a_thread_that_was_entered() -> None:
    done: list[object] = []
    thread = LaunchThread(enter=lambda: done.append(threading.current_thread().name))
    thread.launch(lambda: done.append(1))  # handed over before the start
    thread.start()
    for number in (2, 3):
        thread.launch(lambda number=number: done.append(number))
    thread.close()
    assert done == ["pie-launch", 1, 2, 3]


def test_what_follows_comes_before_what_was_handed_over() -> None:
    done: list[int] = []
    thread = LaunchThread(enter=lambda: None)

    def first() -> None:
        thread.follow(lambda: done.append(2))
        thread.follow(lambda: done.append(3))
        done.append(1)

    for work in (first, lambda: done.append(4)):
        thread.launch(work)
    thread.start()
    thread.close()
    assert done == [1, 2, 3, 4]


def test_one_that_never_started_is_closed() -> None:
    LaunchThread(enter=lambda: None).close()


def delays_s(work: Callable[[], object]) -> list[float]:
    """From handing it over to its end, shortest first. The loop goes on in Python meanwhile, for
    less than the 5 ms after which the interpreter is taken from a thread."""
    thread = LaunchThread(enter=lambda: None)
    thread.start()
    found = []
    for _ in range(20):
        time.sleep(0.002)  # it waits for work again
        done: list[float] = []
        handed_s = time.perf_counter()
        thread.launch(lambda done=done: (work(), done.append(time.perf_counter())))
        while time.perf_counter() - handed_s < 0.004:
            pass
        while not done:
            time.sleep(0.0005)
        found.append(done[0] - handed_s)
    thread.close()
    return sorted(found)


@pytest.mark.realtime
def test_work_begins_though_the_loop_goes_on_in_python() -> None:
    assert delays_s(lambda: None)[5] < 0.003


@pytest.mark.realtime
def test_work_that_lets_go_of_the_interpreter_is_done_before_the_loop_goes_on() -> None:
    """Each call of a driver does; fifty of them would each wait for a loop that is busy."""
    block = bytes(20_000)
    assert delays_s(lambda: [zlib.crc32(block) for _ in range(50)])[10] < 0.003


@pytest.mark.realtime
def test_the_loop_stands_still_until_it_is_issued_but_not_for_long() -> None:
    thread = LaunchThread(enter=lambda: None)
    thread.start()
    issued: list[str] = []
    thread.launch(lambda: (time.sleep(0.0005), issued.append("soon")))
    assert issued == ["soon"]
    go_on = threading.Event()
    thread.launch(lambda: (go_on.wait(10), issued.append("late")))
    assert issued == ["soon"]
    handed_s = time.perf_counter()
    for _ in range(100):
        thread.launch(lambda: issued.append("behind it"))
    assert time.perf_counter() - handed_s < 50 * MOST_WAIT_S
    go_on.set()
    while len(issued) < 102:
        time.sleep(0.001)
    thread.launch(lambda: issued.append("again"))
    assert issued[-1] == "again"
    thread.close()
    assert issued[:3] == ["soon", "late", "behind it"]
