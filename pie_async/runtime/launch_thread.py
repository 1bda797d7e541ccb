"""A thread that issues work to a device, in order, beside the event loop."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

Work = Callable[[], None]


class LaunchThread:
    """Runs what it is handed, one after the other; never waits for the device."""

    def __init__(self, *, enter: Callable[[], None]) -> None:
        """`enter`: what the thread does first."""
        self._enter = enter
        self._works: SimpleQueue[Work | None] = SimpleQueue()
        self._next: deque[Work] = deque()  # launch thread only
        self._thread = threading.Thread(target=self._run, name="pie-launch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def launch(self, work: Work) -> None:
        """Hand over; called on the loop.

        The thread begins at once: the interpreter is let go of for that. Otherwise it would begin
        when the loop next waits, after readers have been told of a hundred tokens, with the device
        idle meanwhile (`scripts/bench_launch.py`).
        """
        self._works.put(work)
        time.sleep(0)

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
        while (work := self._works.get()) is not None:
            work()
            while self._next:
                self._next.popleft()()
