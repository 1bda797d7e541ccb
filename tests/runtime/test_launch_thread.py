"""The launch thread: in order, to the end, and at once."""

from __future__ import annotations

import threading
import time

import pytest

from pie_async.runtime.launch_thread import LaunchThread


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


@pytest.mark.realtime
def test_work_begins_though_the_loop_goes_on_in_python() -> None:
    """For less than the 5 ms after which Python takes the interpreter from a thread."""
    thread = LaunchThread(enter=lambda: None)
    thread.start()
    delays_s = []
    for _ in range(20):
        time.sleep(0.002)  # it waits for work again
        began: list[float] = []
        handed_s = time.perf_counter()
        thread.launch(lambda began=began: began.append(time.perf_counter()))
        while time.perf_counter() - handed_s < 0.004:
            pass
        while not began:
            time.sleep(0.001)
        delays_s.append(began[0] - handed_s)
    thread.close()
    assert sorted(delays_s)[5] < 0.003
