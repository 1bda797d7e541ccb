"""Turns a started engine's world unsteady: late mail, uneven kernels and copies, refused memory.

From outside: actors, device and core know nothing of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import msgspec

from pie_async.assembly import Parts
from pie_async.device.cost_model import CostModel, Work
from pie_async.device.sim import SimDevice
from pie_async.engine import Engine
from pie_async.runtime.late_mail import LateMail
from pie_async.wiring import sender_of
from tests.support.chaos import Chaos, Pool


def delay_mail(engine: Engine, chaos: Chaos) -> None:
    """Messages between the engine's actors take a while from now on."""
    if not chaos.mail_delay_s:
        return
    assert engine._actors is not None
    for actor in engine._actors.supervisor._actors:
        delay_s = partial(_delay_s, chaos.dice(f"mail to {actor.name}"), chaos.mail_delay_s)
        LateMail(actor.mailbox, delay_s=delay_s, sender_of=sender_of)


def _delay_s(dice: Random, mean_s: float, message: Any) -> float:
    return dice.expovariate(1 / mean_s)


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
    device = getattr(device, "inner", device)
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
