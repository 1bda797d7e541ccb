"""An event loop whose clock jumps: hours of timers in milliseconds, the same every time.

After trio's MockClock (src/trio/_core/_mock_clock.py): when every task is blocked, time
moves to the next deadline. Sockets work as usual, on the real kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import selectors
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVarTuple, Unpack

_Ts = TypeVarTuple("_Ts")


class Deadlock(RuntimeError):
    """Every task waits, no timer is set, and nothing outside the loop is at work."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Never sleeps: when idle, jumps to the next deadline; with none, raises `Deadlock`.

    The clock starts at 0.0. It stands still while work outside the loop is outstanding:
    executor jobs are seen by the loop itself; whoever waits for a thread of their own says
    so with `holding_time`. Without that, a timer may win against a thread's wake-up.

    `deadlock_after_s` (real seconds) is how long an idle loop with nothing outstanding
    waits for an unannounced `call_soon_threadsafe` before it calls itself deadlocked.

    `order_seed` draws which of the callbacks that are ready runs next, instead of first come,
    first served: code that needs no other order than its own awaits must not mind. Not for
    asyncio's transports, which count on the usual order.
    """

    def __init__(self, *, deadlock_after_s: float = 0.2, order_seed: int | None = None) -> None:
        self._now_s = 0.0
        self._outstanding = 0
        self._deadlock_after_s = deadlock_after_s
        selector = selectors.DefaultSelector()
        self._poll = selector.select
        super().__init__(selector)
        selector.select = self._select  # type: ignore[method-assign]
        if order_seed is not None:
            self._ready: deque[asyncio.Handle] = _AnyOrder(random.Random(order_seed))

    @property
    def _clock_resolution(self) -> float:
        """By which asyncio lets timers ring early: not at all. What a device says will be there
        then is not there a nanosecond before."""
        return math.ulp(self._now_s)

    @_clock_resolution.setter
    def _clock_resolution(self, _: float) -> None:
        """asyncio sets what the real clock has."""

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    def jump(self, seconds: float) -> None:
        """Be so much later at once: timers in between are all late."""
        self._now_s += seconds

    @contextlib.contextmanager
    def holding_time(self) -> Iterator[None]:
        """Keep the clock still inside the block: something outside the loop will wake it."""
        self._outstanding += 1
        try:
            yield
        finally:
            self._outstanding -= 1

    def run_in_executor(
        self, executor: Any, func: Callable[[Unpack[_Ts]], Any], *args: *_Ts
    ) -> asyncio.Future[Any]:
        """As asyncio's; the clock stands still until the job is done or its wait cancelled."""
        future = super().run_in_executor(executor, func, *args)
        self._outstanding += 1
        future.add_done_callback(self._job_done)
        return future

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        """As asyncio's; it waits for the executor's threads in real time."""
        with self.holding_time():
            await super().shutdown_default_executor(*args, **kwargs)

    def _job_done(self, _: asyncio.Future[Any]) -> None:
        self._outstanding -= 1

    def _select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._poll(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self._outstanding:
            return self._poll(None)
        if timeout is None:
            ready = self._poll(self._deadlock_after_s)
            if not ready:
                raise Deadlock(
                    f"every task is waiting and no timer is set, at {self._now_s:.6f} s of "
                    f"virtual time:\n{self._describe_tasks()}"
                )
            return ready
        self._now_s += timeout
        return ready

    def _describe_tasks(self) -> str:
        tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        return "\n".join(f"  {task.get_name()} at {_innermost(task.get_coro())}" for task in tasks)


class _AnyOrder(deque[asyncio.Handle]):
    """The loop's ready callbacks; the next one is drawn."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self._dice = dice

    def popleft(self) -> asyncio.Handle:
        if len(self) > 1:
            self.rotate(-self._dice.randrange(len(self)))
        return super().popleft()


def _innermost(awaiting: Any) -> str:
    """Where a suspended coroutine stands: file and line of its innermost Python frame."""
    place = repr(awaiting)
    while awaiting is not None:
        frame = getattr(awaiting, "cr_frame", None) or getattr(awaiting, "ag_frame", None)
        if frame is not None:
            place = f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
        awaiting = getattr(awaiting, "cr_await", None) or getattr(awaiting, "ag_await", None)
    return place
