"""A thread that issues work to a device, in order, beside the event loop."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

Work = Callable[[], None]
MOST_WAIT_S = 3e-3
"""That the loop lets the thread work undisturbed. Most iterations are issued in less; a prompt
whose kernels are launched one by one takes more, and the loop goes on beside it."""


class LaunchThread:
    """Runs what it is handed, one after the other; never waits for the device."""

    def __init__(self, *, enter: Callable[[], None]) -> None:
        """`enter`: what the thread does first."""
        self._enter = enter
        self._works: SimpleQueue[tuple[Work, threading.Event] | None] = SimpleQueue()
        self._next: deque[Work] = deque()  # launch thread only
        self._last_done = threading.Event()
        self._last_done.set()
        self._thread = threading.Thread(target=self._run, name="pie-launch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def launch(self, work: Work) -> None:
        """Hand over, and stand still until it is done, `MOST_WAIT_S` at most; called on the loop.

        Issuing an iteration takes a millisecond and some fifty calls of the driver. Each of them
        lets go of the interpreter, and gets it back late: when the loop next waits, after readers
        have been told of a hundred tokens. By then the device may have nothing left to do
        (`scripts/bench_launch.py`). Who finds the thread at work does not wait.
        """
        before, self._last_done = self._last_done, threading.Event()
        self._works.put((work, self._last_done))
        if before.is_set():
            self._last_done.wait(MOST_WAIT_S)

    def follow(self, work: Work) -> None:
        """Do this right after the work that is being done, before all that was handed over; called
        by that work."""
        self._next.append(work)

    def close(self) -> None:
        """Return when all that was handed over is done; what is handed over later is not."""
        self._works.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        self._enter()
        while (handed := self._works.get()) is not None:
            work, done = handed
            work()
            while self._next:
                self._next.popleft()()
            done.set()
