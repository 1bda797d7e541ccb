"""Any device, with what a plan of faults makes go wrong.

Slow work keeps the stream busy before it. Stuck and failed work is done all the same: only word of
it is withheld or turned into a fault, for what waits for it and what is issued behind it. So the
device below can always be drained and closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from pie_async.device.attempts import Outcome, Tamper
from pie_async.device.protocol import Device, Event, MemoryPlan, Pass, Span, Stream
from pie_async.errors import DeviceFault
from pie_async.messages import BlockMove, CopyRun, RunIteration
from pie_async.runtime.faults import (
    CopyCorrupted,
    CopyFailed,
    CopyKind,
    CopySlow,
    CopyStuck,
    DeviceOutOfMemory,
    EventNeverFires,
    Faults,
    KernelSlow,
    LostContext,
    PinningRefused,
    StickyError,
    StreamName,
)

Callback = Callable[[BaseException | None], None]


class _Event:
    """The device's event, and what has become of its stream by then."""

    __slots__ = ("event", "fault", "is_stuck")

    def __init__(self, event: Event, *, fault: DeviceFault | None, is_stuck: bool) -> None:
        self.event = event
        self.fault = fault
        self.is_stuck = is_stuck


class _Stream:
    """The device's stream. Once stuck or failed it stays so, and whoever waits for it is too."""

    def __init__(self, name: StreamName, stream: Stream, faults: Faults) -> None:
        self.stream = stream
        self.fault: DeviceFault | None = None
        self.is_stuck = False
        self._name = name
        self._faults = faults

    def record(self) -> _Event:
        never = self._faults.at(EventNeverFires, stream=self._name) is not None
        is_stuck = self.is_stuck or never
        return _Event(self.stream.record(), fault=self.fault, is_stuck=is_stuck)

    def wait(self, event: Event) -> None:
        assert isinstance(event, _Event)
        self.fault = self.fault or event.fault
        self.is_stuck = self.is_stuck or event.is_stuck
        self.stream.wait(event.event)

    def delay(self, seconds: float) -> None:
        self.stream.delay(seconds)


class FaultyDevice:
    """Implements `device/protocol.py` over a device.

    Attributes:
        inner: that device.
    """

    def __init__(self, inner: Device, faults: Faults) -> None:
        self.inner = inner
        self._faults = faults
        self.compute = _Stream("compute", inner.compute, faults)
        self.h2d = _Stream("h2d", inner.h2d, faults)
        self.d2h = _Stream("d2h", inner.d2h, faults)
        self._lost: DeviceFault | None = None
        self._memory = inner.memory
        self._most_slots: int | None = None
        self._tell_pool: Callable[[int, str | None], None] | None = None
        if faults.has(CopyFailed, CopyCorrupted):
            inner.tamper = self._outcome
        refused = faults.at(PinningRefused)
        if refused is not None:
            self._refuse_pinning(refused.share)

    @property
    def memory(self) -> MemoryPlan:
        return self._memory

    @property
    def tamper(self) -> Tamper | None:
        return self.inner.tamper

    @tamper.setter
    def tamper(self, tamper: Tamper | None) -> None:
        self.inner.tamper = tamper

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.inner.start(loop)

    def launch(self, issue: Callable[[], None]) -> None:
        self.inner.launch(issue)

    # --- compute ----------------------------------------------------------------------------

    def begin_pass(self, command: RunIteration) -> Pass:
        faults = self._faults
        if faults.at(DeviceOutOfMemory):
            self.compute.fault = self.compute.fault or _fault("no memory for an iteration")
        if faults.at(StickyError):
            self.compute.fault = self.compute.fault or _fault("the compute stream failed")
        if faults.at(LostContext):
            self._lost = self._lost or _fault("the device was lost")
        return self.inner.begin_pass(command)

    def run_layers(self, forward: Pass, layers: range, *, is_staged: bool) -> None:
        slow = self._faults.at(KernelSlow)
        if slow is not None:
            self.compute.delay(slow.seconds)
        self.inner.run_layers(forward, layers, is_staged=is_staged)

    def sample(self, forward: Pass) -> None:
        self.inner.sample(forward)

    # --- copies -----------------------------------------------------------------------------

    def stage(self, layers: range, runs: Sequence[CopyRun]) -> None:
        self._before(self.h2d, "stage")
        self.inner.stage(layers, runs)

    def write_back(self, layers: range, runs: Sequence[CopyRun]) -> None:
        self.inner.write_back(layers, runs)

    def promote(self, moves: Sequence[BlockMove]) -> None:
        self._before(self.h2d, "promote")
        self.inner.promote(moves)

    def demote(self, moves: Sequence[BlockMove]) -> None:
        self._before(self.d2h, "demote")
        self.inner.demote(moves)

    def _before(self, stream: _Stream, kind: CopyKind) -> None:
        slow = self._faults.at(CopySlow, copy=kind)
        if slow is not None:
            stream.delay(slow.seconds)
        if self._faults.at(CopyStuck, copy=kind):
            stream.is_stuck = True

    def _outcome(self, kind: CopyKind) -> Outcome:
        if self._faults.at(CopyFailed, copy=kind):
            return "fails"
        return "corrupted" if self._faults.at(CopyCorrupted, copy=kind) else "arrives"

    # --- completions ------------------------------------------------------------------------

    def notify(self, event: Event, callback: Callback) -> None:
        assert isinstance(event, _Event)
        if not event.is_stuck:
            self.inner.notify(
                event.event, lambda fault: callback(event.fault or self._lost or fault)
            )

    def span(self, first: Event, last: Event) -> Span:
        assert isinstance(first, _Event) and isinstance(last, _Event)
        return self.inner.span(first.event, last.event)

    async def drain(self) -> None:
        await self.inner.drain()

    def close(self) -> None:
        self.inner.close()

    # --- the pool ---------------------------------------------------------------------------

    def _refuse_pinning(self, share: float) -> None:
        """Only so much of the pool is there; asked for more, the operating system refuses."""
        slots = self._most_slots = int(share * self._memory.host_slots)
        first = min(slots, self._memory.first_host_slots)
        self._memory = msgspec.structs.replace(self._memory, first_host_slots=first)

    def watch_pool(self, grown: Callable[[int, str | None], None]) -> None:
        most = self._most_slots
        if most is None:
            self.inner.watch_pool(grown)
            return

        def tell(slots: int, refusal: str | None) -> None:
            grown(min(slots, most), refusal or (_REFUSED if slots >= most else None))

        self._tell_pool = tell
        self.inner.watch_pool(tell)
        asyncio.get_running_loop().call_soon(tell, self.inner.memory.first_host_slots, None)

    def resize_pool(self, slots: int) -> None:
        most = self._most_slots
        if most is None or slots <= most:
            self.inner.resize_pool(slots)
        else:
            tell = cast("Callable[[int, str | None], None]", self._tell_pool)
            asyncio.get_running_loop().call_soon(tell, most, None)


_REFUSED = "fault pinning_refused: the operating system pins no more host memory"


def _fault(what: str) -> DeviceFault:
    return DeviceFault(f"{what} (by a plan of faults)")
