"""Turns a started engine's world unsteady: late mail, uneven kernels and copies, refused memory.

From outside: actors, device and core know nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from pie_async.assembly import Parts
from pie_async.device.cost_model import CostModel, Work
from pie_async.device.sim import SimDevice
from pie_async.engine import Engine
from pie_async.errors import MailboxClosed
from pie_async.messages import (
    IterationRan,
    IterationStaged,
    SetStreamedLimit,
    SwappedIn,
    SwappedOut,
)
from pie_async.runtime.mailbox import Mailbox
from tests.support.chaos import Chaos, Pool

SENDERS = {
    IterationRan: "compute",
    IterationStaged: "swap_in",
    SwappedIn: "swap_in",
    SwappedOut: "swap_out",
    SetStreamedLimit: "governor",
}
"""Who sends the scheduler what; everything else comes from one sender, or from callers."""


class LateMail:
    """Hands a mailbox its messages late: those of one sender in order, of several in any."""

    def __init__(self, mailbox: Mailbox[Any], mean_s: float, dice: Random) -> None:
        self._deliver = mailbox.post
        self._mailbox = mailbox
        self._mean_s = mean_s
        self._dice = dice
        self._under_way: dict[str, deque[Any]] = {}
        self._last_s: dict[str, float] = {}

    def post(self, message: Any) -> None:
        """In place of `Mailbox.post`."""
        if self._mailbox.is_closed:
            raise MailboxClosed(f"the {self._mailbox.name} mailbox is closed")
        loop = asyncio.get_running_loop()
        sender = SENDERS.get(type(message), "")
        at_s = loop.time() + self._dice.expovariate(1 / self._mean_s)
        at_s = self._last_s[sender] = max(at_s, self._last_s.get(sender, 0.0))
        under_way = self._under_way.setdefault(sender, deque())
        under_way.append(message)
        loop.call_at(at_s, self._arrive, under_way)

    def _arrive(self, under_way: deque[Any]) -> None:
        # Which of a sender's timers this is does not matter: its oldest message comes first.
        with contextlib.suppress(MailboxClosed):  # the engine has ended
            self._deliver(under_way.popleft())


def delay_mail(engine: Engine, chaos: Chaos) -> None:
    """Messages between the engine's actors take a while from now on."""
    if not chaos.mail_delay_s:
        return
    assert engine._actors is not None
    for actor in engine._actors.supervisor._actors:
        late = LateMail(actor.mailbox, chaos.mail_delay_s, chaos.dice(f"mail to {actor.name}"))
        actor.mailbox.post = late.post  # type: ignore[method-assign]


class UnevenCost:
    """A cost model whose every answer is off by a factor of its own."""

    def __init__(
        self, cost: CostModel, kernel: Callable[[], float], copy: Callable[[], float]
    ) -> None:
        self._cost = cost
        self._kernel = kernel
        self._copy = copy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cost, name)

    def layer_s(self, work: Work) -> float:
        return self._cost.layer_s(work) * self._kernel()

    def head_s(self, work: Work) -> float:
        return self._cost.head_s(work) * self._kernel()

    def copy_s(self, num_bytes: int, num_runs: int) -> float:
        return self._cost.copy_s(num_bytes, num_runs) * self._copy()


def vary_times(engine: Engine, chaos: Chaos, spread: Callable[[Random, float], float]) -> None:
    """Kernels and copies of this engine take other times from now on."""
    device: Any = engine._loaded().device
    kernels, copies = chaos.dice("kernels"), chaos.dice("copies")
    device.cost = UnevenCost(
        device.cost,
        lambda: spread(kernels, chaos.kernel_spread),
        lambda: spread(copies, chaos.copy_spread),
    )


class UnevenPoolDevice(SimDevice):
    """A simulated device whose host pool is pinned bit by bit, and perhaps not all of it."""

    pool: Pool

    def watch_pool(self, grown: Callable[[int, str | None], None]) -> None:
        """See `Device`."""
        super().watch_pool(grown)
        if self.pool_slots < self.memory.host_slots:
            self._grow(self.memory.host_slots)

    def resize_pool(self, slots: int) -> None:
        """See `Device`."""
        if slots <= self.pool_slots:
            super().resize_pool(slots)
        else:
            self._grow(slots)

    def _grow(self, target: int) -> None:
        asyncio.get_running_loop().call_later(self.pool.pinning_s, self._pinned, target)

    def _pinned(self, target: int) -> None:
        most, step = self.pool.refused_at, self.memory.chunk_slots or 8
        slots = min(target, self.pool_slots + step)
        if self._loop is None or self._pool_watcher is None:
            return
        if most is not None and slots > most:
            self._pool_watcher(self.pool_slots, "the operating system pins no more (drawn)")
            return
        self.pool_slots = slots
        self._pool_watcher(slots, None)
        if slots < target:
            self._grow(target)


def withhold_pool(parts: Parts, pool: Pool) -> Parts:
    """Parts of an engine whose host pool comes and goes as drawn."""
    device = parts.device
    assert isinstance(device, SimDevice)
    device.__class__ = UnevenPoolDevice
    assert isinstance(device, UnevenPoolDevice)
    device.pool = pool
    device.pool_slots = pool.first_slots
    device._memory = msgspec.structs.replace(
        device._memory, first_host_slots=pool.first_slots, chunk_slots=pool.chunk_slots
    )
    return parts
