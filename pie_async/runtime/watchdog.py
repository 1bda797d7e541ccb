"""A thread that notices what no task can tell of: a loop that does not turn, work that never ends.

Whatever is watched has a position that changes while it gets on. Time is counted in the thread's
own ticks, so neither a clock that jumps nor a process that was stopped for a while looks like a
stall.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from pie_async.runtime.mailbox import Mailbox
from pie_async.runtime.virtual_time import VirtualTimeLoop

TICKS = 8
"""In which the patience is counted."""
FIRST_TIMES = 10
"""What has never ended anything may take so many times longer: kernels are compiled, and their
shapes chosen, when they are used first."""
STUCK = 71
"""Exit status of a process that its watchdog ended."""

_log = logging.getLogger(__name__)


class Watched(Protocol):
    """Something that gets on, or has nothing to do. Asked in the watchdog's thread."""

    name: str

    def position(self) -> Hashable | None:
        """Another value whenever it got on; None while nothing is to be done."""

    def patience(self) -> int:
        """How many times the usual time it may take."""

    def tell(self) -> str:
        """What it has to do, in a few words."""


class Issued:
    """Work that was issued in order and has not ended, such as that of a device's stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._pending: dict[int, str] = {}
        self._num_issued = 0
        self._num_ended = 0

    def add(self, what: str, ended: asyncio.Future[Any]) -> None:
        """Watch `ended` until it is done, whatever comes of it. Called on the loop."""
        self._num_issued += 1
        number = self._num_issued
        self._pending[number] = what
        ended.add_done_callback(lambda _: self._end(number))

    def _end(self, number: int) -> None:
        del self._pending[number]
        self._num_ended += 1

    def position(self) -> Hashable | None:
        return self._num_ended if self._pending else None

    def patience(self) -> int:
        return 1 if self._num_ended else FIRST_TIMES

    def tell(self) -> str:
        # One C call, so that the loop's thread cannot change it meanwhile.
        pending = list(self._pending.values())
        shown = ", ".join(pending[:8]) or "nothing"
        more = f" and {len(pending) - 8} more" if len(pending) > 8 else ""
        return f"{shown}{more} issued and not completed; {self._num_ended} completed"


class Mail:
    """An actor's mailbox: what is in it must be read."""

    def __init__(self, mailbox: Mailbox[Any]) -> None:
        self.name = f"actor {mailbox.name}"
        self._mailbox = mailbox

    def position(self) -> Hashable | None:
        return self._mailbox.num_read if len(self._mailbox) else None

    def patience(self) -> int:
        return 1

    def tell(self) -> str:
        box = self._mailbox
        return f"{len(box)} of at most {box.capacity} messages unread, {box.num_read} read"


class Turns:
    """An event loop: it must answer."""

    name = "event loop"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asked = self._answered = 0

    def ask(self) -> bool:
        """Ask for a turn; False if the loop is closed."""
        self._asked += 1
        try:
            self._loop.call_soon_threadsafe(self._answer, self._asked)
        except RuntimeError:
            return False
        return True

    def _answer(self, number: int) -> None:
        self._answered = number

    @property
    def is_late(self) -> bool:
        return self._answered < self._asked

    def position(self) -> Hashable | None:
        return self._answered if self.is_late else None

    def patience(self) -> int:
        return 1

    def tell(self) -> str:
        return f"asked for a turn {self._asked} times, given {self._answered}"


class Watchdog:
    """Asks a loop and all that runs on it, eight times in `within_s`, whether they get on."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        watched: Sequence[Watched],
        *,
        within_s: float,
        bite: Callable[[Watched], None],
    ) -> None:
        """
        Args:
            within_s: how long anything may stand still.
            bite: called in the watchdog's thread, once each time that something stands still.
        """
        self._loop = loop
        self._turns = Turns(loop)
        self._others = tuple(watched)
        self._within_s = within_s
        self._bite = bite
        self._still: dict[str, tuple[Hashable, int]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pie-watchdog", daemon=True)

    @property
    def watched(self) -> tuple[Watched, ...]:
        return (self._turns, *self._others)

    def start(self) -> None:
        """Begin. In virtual time there is nothing to do: its loop says itself when it is stuck."""
        if not isinstance(self._loop, VirtualTimeLoop):
            self._thread.start()

    def close(self) -> None:
        """Watch no more; returns at once."""
        self._closed.set()

    def tick(self) -> Watched | None:
        """Look once; what has stood still for too long, the first time that it has."""
        # A loop that does not turn is why nothing else gets on.
        looked_at = (self._turns,) if self._turns.is_late else self.watched
        stuck = [one for one in looked_at if self._is_stuck(one)]
        if not self._turns.is_late and not self._turns.ask():
            self.close()
        return stuck[0] if stuck else None

    def _is_stuck(self, one: Watched) -> bool:
        position = one.position()
        before, ticks = self._still.get(one.name, (None, 0))
        ticks = ticks + 1 if position is not None and position == before else 0
        self._still[one.name] = (position, ticks)
        return ticks == TICKS * one.patience()

    def _run(self) -> None:
        while not self._closed.wait(self._within_s / TICKS):
            try:
                stuck = self.tick()
                if stuck is not None:
                    self._bite(stuck)
            except Exception:
                _log.exception("the watchdog could not look")
