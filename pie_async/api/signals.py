"""Signals that several servers of one process hear."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class _Heard:
    """A signal's handler for as long as anybody listens.

    The handlers of `loop.add_signal_handler` replace each other, and removing one restores
    nothing. This one lies in the process's own table, where the next listener finds it.
    """

    def __init__(self, number: signal.Signals) -> None:
        self._number = number
        self._before = signal.signal(number, self)
        self._listeners: list[Callable[[], None]] = []

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        for tell in list(self._listeners):
            tell()

    def add(self, tell: Callable[[], None]) -> None:
        self._listeners.append(tell)

    def remove(self, tell: Callable[[], None]) -> None:
        """The last one to leave puts back what was there, unless it was replaced meanwhile."""
        self._listeners.remove(tell)
        is_in_place = signal.getsignal(self._number) is self
        if is_in_place and not self._listeners:
            # None: it was set by something other than Python, which cannot be set again
            signal.signal(self._number, self._before or signal.SIG_DFL)


@contextmanager
def listening(on_signal: Callable[[], None], *numbers: signal.Signals) -> Iterator[None]:
    """Have the running loop call `on_signal` for each of these signals; for the main thread.

    Who listens already goes on hearing them; an earlier handler of another kind is put back at
    the end.
    """
    loop = asyncio.get_running_loop()

    def tell() -> None:
        loop.call_soon_threadsafe(on_signal)  # it wakes the loop, which a handler alone does not

    heard = [_handler(number) for number in numbers]
    for handler in heard:
        handler.add(tell)
    try:
        yield
    finally:
        for handler in heard:
            handler.remove(tell)


def _handler(number: signal.Signals) -> _Heard:
    """The one that is in place, or a new one."""
    there = signal.getsignal(number)
    return there if isinstance(there, _Heard) else _Heard(number)
