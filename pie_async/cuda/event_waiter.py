"""From CUDA events to callbacks on the event loop.

One thread per stream sleeps in the driver, without the interpreter's lock, until the earliest
event that somebody waits for has fired. Nothing polls, and no Python runs in a thread of the
driver's own, where it could not call CUDA.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

from pie_async.cuda.streams import CudaEvent, CudaStream

if TYPE_CHECKING:
    from pie_async.cuda.driver import Driver

Callback = Callable[[BaseException | None], None]


class EventWaiter:
    """Announces one stream's events, in their order as far as they are asked for in time."""

    def __init__(self, stream: CudaStream, driver: Driver) -> None:
        self._stream = stream
        self._driver = driver
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[tuple[int, int, CudaEvent, Callback]] = []  # a heap
        self._ties = count()
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._run, name=f"pie-wait-{stream.name}", daemon=True
        )

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        """End the thread, once everything that somebody waits for is announced."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def notify(self, event: CudaEvent, callback: Callback) -> None:
        """See `Device.notify`; from any thread."""
        with self._changed:
            heapq.heappush(self._waiting, (event.number, next(self._ties), event, callback))
            self._changed.notify()

    def _run(self) -> None:
        self._driver.enter_thread()
        while (event := self._next()) is not None:
            self._stream.await_event(event)
            self._announce(event.number)

    def _next(self) -> CudaEvent | None:
        """The earliest event that somebody waits for; None at the end."""
        with self._changed:
            while not self._waiting and not self._is_closing:
                self._changed.wait()
            return self._waiting[0][2] if self._waiting else None

    def _announce(self, number: int) -> None:
        """Tell all who wait for events up to this one."""
        while True:
            with self._changed:
                if not self._waiting or self._waiting[0][0] > number:
                    return
                _, _, event, callback = heapq.heappop(self._waiting)
            self._call(callback, event.fault)

    def _call(self, callback: Callback, fault: BaseException | None) -> None:
        assert self._loop is not None, "start() comes before notify()"
        try:
            self._loop.call_soon_threadsafe(callback, fault)
        except RuntimeError:
            if not self._loop.is_closed():
                raise  # with the loop gone nobody is left to be told
