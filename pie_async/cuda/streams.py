"""Streams and events, with how long a stream worked and how long it waited.

The launch thread alone records and waits; the stream's waiter thread (`event_waiter.py`)
alone settles. Each wait is enclosed in two events, so that the time between them is the time
waited. CUDA's events are used again and again: one is free once the next one has fired.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from pie_async.device.attempts import Attempts
from pie_async.device.protocol import Event
from pie_async.errors import DeviceFault

if TYPE_CHECKING:
    from pie_async.cuda.driver import Driver


class CudaEvent:
    """A point in a stream's order, with what the stream had done by then.

    Attributes:
        number: among the stream's events, rising.
        handle: the CUDA event; another's once this one has fired.
        has_fired: set when settled, which may be later than the GPU got there.
        busy_s, waited_s: by the stream, since its first event; valid once fired.
        fault: known when it was recorded, or found when it fired.
    """

    __slots__ = (
        "attempts",
        "busy_s",
        "fault",
        "handle",
        "has_fired",
        "number",
        "stream",
        "waited_s",
    )

    def __init__(self, stream: CudaStream, number: int, handle: int) -> None:
        self.stream = stream
        self.number = number
        self.handle = handle
        self.attempts = stream.attempts.mark()
        self.has_fired = False
        self.busy_s = 0.0
        self.waited_s = 0.0
        self.fault: DeviceFault | None = None


class _Mark(NamedTuple):
    """A recorded CUDA event that is not settled yet."""

    number: int
    handle: int
    ends_wait: bool
    event: CudaEvent | None


class CudaStream:
    """An ordered queue of GPU work.

    After a failure nothing more is to be issued: events recorded behind it carry the fault, and
    so do streams that wait for them.
    """

    def __init__(self, name: str, driver: Driver) -> None:
        self.name = name
        self.handle = driver.create_stream()
        self.fault: DeviceFault | None = None
        self.attempts = Attempts()
        self._driver = driver
        self._number = 0
        self._has_work = False
        self._marks: deque[_Mark] = deque()
        self._free: list[int] = []
        self._handles: list[int] = []
        # Waiter thread only.
        self._settled: int | None = None
        self._busy_s = 0.0
        self._waited_s = 0.0

    def note_work(self) -> None:
        """Something is issued to the stream by other means than this class."""
        self._has_work = True

    def record(self) -> CudaEvent:
        event = CudaEvent(self, self._number, 0)
        event.handle = self._mark(event=event)
        event.fault = self.fault
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        if event.fault is not None:
            self.fail(event.fault)
        if event.has_fired or self.fault is not None:
            return
        if self._has_work:  # else the last event is where the wait begins
            self._mark()
        try:
            self._driver.wait(self.handle, event.handle)
        except DeviceFault as fault:
            self.fail(fault)
        self._mark(ends_wait=True)

    def delay(self, seconds: float) -> None:
        if self.fault is None:
            self.note_work()
            self._driver.spin(seconds, self.handle)

    def fail(self, error: BaseException) -> None:
        """Issuing to this stream failed; the first failure counts."""
        if self.fault is not None:
            return
        if isinstance(error, DeviceFault):
            self.fault = error
        else:
            fault = DeviceFault(f"the {self.name} stream failed: {type(error).__name__}: {error}")
            fault.__cause__ = error
            self.fault = fault

    def await_event(self, event: CudaEvent) -> None:
        """Block until it has fired, then settle it and all before it. Waiter thread only."""
        if event.has_fired:
            return
        try:
            if event.handle:  # 0: not even recorded, and `event.fault` says why
                self._driver.synchronize(event.handle)
                self._settle(event.number)
        except DeviceFault as fault:
            self.fail(fault)
            event.fault = event.fault or fault

    def close(self, *, is_kept: bool = False) -> None:
        """Give events and stream back; no work is left on it."""
        for handle in self._handles:
            self._driver.destroy_event(handle)
        if not is_kept:
            self._driver.destroy_stream(self.handle)

    def _mark(self, *, ends_wait: bool = False, event: CudaEvent | None = None) -> int:
        try:
            handle = self._free.pop() if self._free else self._new_event()
            self._driver.record(handle, self.handle)
        except DeviceFault as fault:  # a lost context refuses even to create an event
            self.fail(fault)
            return 0
        self._marks.append(_Mark(self._number, handle, ends_wait, event))
        self._number += 1
        self._has_work = False
        return handle

    def _new_event(self) -> int:
        handle = self._driver.create_event()
        self._handles.append(handle)
        return handle

    def _settle(self, number: int) -> None:
        while self._marks and self._marks[0].number <= number:
            mark = self._marks.popleft()
            if self._settled is not None:
                self._count(self._driver.elapsed_s(self._settled, mark.handle), mark.ends_wait)
                self._free.append(self._settled)
            self._settled = mark.handle
            if mark.event is not None:
                mark.event.busy_s, mark.event.waited_s = self._busy_s, self._waited_s
                mark.event.has_fired = True

    def _count(self, elapsed_s: float, is_wait: bool) -> None:
        if is_wait:
            self._waited_s += elapsed_s
        else:
            self._busy_s += elapsed_s
