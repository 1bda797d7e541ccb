"""The little that actors and the launcher know of a device.

A device has three streams (compute, h2d, d2h). A stream does its work in the order in which
it was issued; streams are ordered against each other by events alone. As on CUDA, an event
must be recorded before a wait on it is issued. `device/launcher.py` turns the actors'
commands into these calls, the same way for every device.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from pie_async.config import MIB
from pie_async.core.layout import KvLayout
from pie_async.device.attempts import Tamper
from pie_async.ids import HostSlot, IterationId, SequenceId
from pie_async.messages import (
    BlockMove,
    CopyRun,
    MaskMade,
    MaskOrder,
    PromptLogprobs,
    RunIteration,
    SampledToken,
    StageIteration,
)

POOL_CHUNK_BYTES = 256 * MIB
"""Of host memory, by which the pool grows and shrinks: pinned in a tenth of a second, and one
layer of it is still one long copy."""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the device set aside for KV."""

    layout: KvLayout
    device_slots: int
    """Resident slots. Slot numbers 0 .. device_slots - 1."""
    first_staging_slot: int
    """Number of the first staging slot; at or above `device_slots` (pages need alignment)."""
    staging_slots: int
    """Most blocks that one iteration may stage."""
    host_slots: int
    """Slots of the host pool: its ceiling."""
    first_host_slots: int
    """Those that can be used from the start; `Device.watch_pool` tells of the others."""
    chunk_slots: int = 0
    """By which `Device.resize_pool` takes and gives back memory; 0: it cannot."""


def chunk_slots_of(
    layout: KvLayout, host_slots: int, *, chunk_bytes: int = POOL_CHUNK_BYTES
) -> int:
    """Slots of the host pool that come and go together."""
    return max(1, min(host_slots, chunk_bytes // layout.block_bytes))


class Span(msgspec.Struct, frozen=True):
    """What a stream did between two of its events."""

    busy_s: float
    """Time spent working."""
    waited_s: float
    """Time spent waiting for events of other streams."""
    failed_attempts: int = 0
    """Attempts to copy that went wrong; all but the last of a copy were made again."""
    damaged: tuple[HostSlot, ...] = ()
    """Host slots whose copies, from or to them, went wrong for good."""
    elapsed_s: float = 0.0
    """From the one to the other, idle or not."""


class Event(Protocol):
    """A point in a stream's order; it fires when everything issued before it is done."""


class Pass(Protocol):
    """One iteration's forward pass on its way through the layers."""

    @property
    def sampled(self) -> tuple[SampledToken, ...]:
        """The sampled tokens; readable once an event recorded after `sample` has fired."""

    @property
    def prompt_logprobs(self) -> tuple[PromptLogprobs, ...]:
        """Readable when `sampled` is."""


class Stream(Protocol):
    """An ordered queue of device work."""

    def record(self) -> Event:
        """An event that fires when all work issued so far is done."""

    def wait(self, event: Event) -> None:
        """Work issued from now on starts only after `event`, which is already recorded."""

    def delay(self, seconds: float) -> None:
        """Keep the stream busy for about so long: for plans of faults."""


class Device(Protocol):
    """A device that runs a model over paged KV and copies blocks beside it.

    `begin_pass`, `run_layers` and `sample` work on the compute stream, `stage` and `promote` on
    h2d, `write_back` and `demote` on d2h. All of them return as soon as the work is issued, and are
    called on the launch thread only. Failures of issued work surface at the events recorded after
    it. A copy that went wrong and may be made again is no failure of the stream: it is made again,
    a few times, and `span` tells of it.

    Attributes:
        tamper: what becomes of attempts to copy, if a plan of faults says so.
    """

    tamper: Tamper | None

    @property
    def memory(self) -> MemoryPlan: ...
    @property
    def compute(self) -> Stream: ...
    @property
    def h2d(self) -> Stream: ...
    @property
    def d2h(self) -> Stream: ...

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start threads; completions will be announced on `loop`."""

    def launch(self, issue: Callable[[], None]) -> None:
        """Run `issue` on the launch thread, in the order of the calls. Called on the loop."""

    def begin_pass(self, command: RunIteration) -> Pass:
        """Apply bindings and block tables, embed the fed tokens."""

    def stage(self, layers: range, runs: Sequence[CopyRun]) -> None:
        """Copy these layers of these host slots into the layers' ring buffers."""

    def run_layers(self, forward: Pass, layers: range, *, is_staged: bool) -> None:
        """Run these layers: write the fed tokens' KV, attend over the block tables' slots."""

    def write_back(self, layers: range, runs: Sequence[CopyRun]) -> None:
        """Copy what `stage` copied back to where it came from."""

    def sample(self, forward: Pass) -> None:
        """Sample every row that asks for it and bring the tokens to the host."""

    def promote(self, moves: Sequence[BlockMove]) -> None:
        """Copy all layers of these blocks from host to device slots."""

    def demote(self, moves: Sequence[BlockMove]) -> None:
        """Copy all layers of these blocks from device to host slots."""

    def notify(self, event: Event, callback: Callable[[BaseException | None], None]) -> None:
        """Call back on the event loop, once, when the event fired or can no longer fire."""

    def span(self, first: Event, last: Event) -> Span:
        """What happened between two events of one stream; `notify` announced the last one."""

    def watch_pool(self, grown: Callable[[int, str | None], None]) -> None:
        """Call back on the event loop, after `start`, when there is more or less of the host pool:
        how many slots there are now, and why no more will come, if that is so."""

    def resize_pool(self, slots: int) -> None:
        """Begin to make the host pool so large: whole chunks, or all of it. Called on the loop,
        which it does not block; `watch_pool` tells when it is done. No copy that was issued
        touches the slots that go."""

    async def drain(self) -> None:
        """Return when all issued work is done. Never raises."""

    def close(self) -> None:
        """End the threads and free the memory. The device is drained."""


# --- what each actor sees -------------------------------------------------------------------


class PassResult(msgspec.Struct, frozen=True, kw_only=True):
    """A finished iteration."""

    sampled: tuple[SampledToken, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...]
    compute_s: float
    stall_s: float
    mask_wait_s: float = 0.0
    unstaged: tuple[HostSlot, ...] = ()
    """Blocks that were not staged right: what rows that read them computed is worthless."""


class CopyResult(msgspec.Struct, frozen=True, kw_only=True):
    """Finished copies."""

    copied_bytes: int
    busy_s: float
    failed_attempts: int = 0
    damaged: tuple[HostSlot, ...] = ()
    """Blocks that were not copied right, by their host slots."""
    written_back_bytes: int = 0
    """Copied the other way, where KV is exchanged."""


class ComputeQueue(Protocol):
    """The compute actor's view of the device."""

    def run(self, command: RunIteration) -> asyncio.Future[PassResult]:
        """Issue an iteration; with `is_staged`, together with its staging half.

        The future raises DeviceFault. Cancelling it cancels the wait, never the work.
        """

    def sample(self, iteration: IterationId) -> None:
        """Issue the sampling of an iteration that awaits masks; none was given after it."""


class SwapInQueue(Protocol):
    """The swap-in actor's view of the device."""

    def stage(self, command: StageIteration) -> asyncio.Future[CopyResult]:
        """Give the staging half of an iteration; it is issued together with the other half."""

    def promote(self, moves: Sequence[BlockMove]) -> asyncio.Future[CopyResult]: ...


class SwapOutQueue(Protocol):
    """The swap-out actor's view of the device."""

    def demote(self, moves: Sequence[BlockMove]) -> asyncio.Future[CopyResult]: ...

    def resize_pool(self, slots: int) -> None:
        """See `Device`."""


class Guides(Protocol):
    """The guide actor's view of what guides sequences; masks lie where the device reads them."""

    async def make(self, orders: Sequence[MaskOrder]) -> tuple[MaskMade, ...]:
        """Carry orders out, beside the event loop; those of one sequence never at the same time.

        Never raises: what went wrong is in the result.
        """

    def forget(self, sequences: Sequence[SequenceId]) -> None:
        """They have ended, and none of their masks is being made."""

    def close(self) -> None:
        """No more orders will come."""
