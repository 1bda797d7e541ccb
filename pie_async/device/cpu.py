"""The CPU as a device: real tensors, every hazard of a GPU.

Each stream is a thread that works first in, first out; events order them for real; the link
is a copy of limited rate. Memory for staging is shared between layers as on a GPU, so a
missing wait corrupts text here too, and in debug mode a staging buffer turns to NaN as soon
as it may be overwritten.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch

from pie_async.core.layout import KvLayout
from pie_async.device.aliased_arena import AliasedArena
from pie_async.device.attempts import Attempts, Mark, Tamper
from pie_async.device.copy_runs import runs_of
from pie_async.device.cpu_copies import CpuCopies
from pie_async.device.cpu_pool import CpuPool
from pie_async.device.protocol import Event, MemoryPlan, Pass, Span, chunk_slots_of
from pie_async.errors import DeviceFault
from pie_async.messages import (
    BlockMove,
    CopyRun,
    PromptLogprobs,
    RunIteration,
    SampledToken,
)
from pie_async.runtime.faults import CopyKind

if TYPE_CHECKING:
    from pie_async.model.runner import ModelPass, ModelRunner

Work = Callable[[], None]
Listener = Callable[["CpuEvent"], None]
"""Of a copy, as the device sees it."""


class CpuEvent:
    """A point in a stream's order, with what the stream had done by then."""

    __slots__ = (
        "_gate",
        "_listeners",
        "_lock",
        "at_s",
        "attempts",
        "busy_s",
        "fault",
        "has_fired",
        "stream",
        "waited_s",
    )

    def __init__(self, stream: CpuStream) -> None:
        self.stream = stream
        self.busy_s = 0.0
        self.waited_s = 0.0
        self.at_s = 0.0
        self.attempts: Mark = (0, 0)
        self.fault: BaseException | None = None
        self.has_fired = False
        # A bare lock, held until the event fires: a waiter passes through it. Half the cost of
        # a threading.Event, and there are several per layer group.
        self._gate = threading.Lock()
        self._gate.acquire()
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()

    def fire(self, *, busy_s: float, waited_s: float, fault: BaseException | None) -> None:
        self.busy_s, self.waited_s, self.fault = busy_s, waited_s, fault
        self.at_s = time.perf_counter()
        self.attempts = self.stream.attempts.mark()
        with self._lock:
            self.has_fired = True
            listeners = self._listeners
        self._gate.release()
        for listener in listeners:
            listener(self)

    def wait(self) -> None:
        if not self.has_fired:
            with self._gate:
                pass

    def listen(self, listener: Listener) -> None:
        """Call once after firing, from whichever thread comes second."""
        with self._lock:
            if not self.has_fired:
                self._listeners.append(listener)
                return
        listener(self)


class CpuStream:
    """A thread that does its work in order.

    After a failure nothing more is done: the events behind it fire with the fault, as a CUDA
    context's do once an error sticks.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.attempts = Attempts()
        """Counted on the stream's thread."""
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        self._busy_s = 0.0
        self._waited_s = 0.0
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"pie-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._work.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def put(self, work: Work) -> None:
        """Issue work."""

        def timed() -> None:
            if self._fault is None:
                began_s = time.perf_counter()
                try:
                    work()
                except Exception as error:  # surfaces at the next event
                    self._fault = error
                self._busy_s += time.perf_counter() - began_s

        self._work.put(timed)

    def delay(self, seconds: float) -> None:
        self.put(partial(time.sleep, seconds))

    def record(self) -> CpuEvent:
        event = CpuEvent(self)
        self._work.put(
            lambda: event.fire(busy_s=self._busy_s, waited_s=self._waited_s, fault=self._fault)
        )
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, CpuEvent)
        if event.has_fired and event.fault is None:
            return

        self._work.put(partial(self._await, event))

    def _await(self, event: CpuEvent) -> None:
        if not event.has_fired:
            began_s = time.perf_counter()
            event.wait()
            self._waited_s += time.perf_counter() - began_s
        self._fault = self._fault or event.fault

    def _run(self) -> None:
        with torch.inference_mode():
            while (work := self._work.get()) is not None:
                work()


class CpuPass:
    """One iteration on its way through the compute stream."""

    def __init__(self, command: RunIteration) -> None:
        self.command = command
        self.model_pass: ModelPass | None = None

    @property
    def sampled(self) -> tuple[SampledToken, ...]:
        assert self.model_pass is not None
        return self.model_pass.sampled

    @property
    def prompt_logprobs(self) -> tuple[PromptLogprobs, ...]:
        assert self.model_pass is not None
        return self.model_pass.prompt_logprobs


class CpuDevice:
    """Implements `device/protocol.py` with threads.

    The caller builds the model runner over `arena.layers` and hands it in with `load`.
    """

    def __init__(
        self,
        layout: KvLayout,
        *,
        device_slots: int,
        host_slots: int,
        dtype: torch.dtype,
        link_bytes_per_s: float | None = None,
        threads: int | None = None,
        poisons: bool = False,
        chunk_slots: int | None = None,
        checks_copies: bool = False,
    ) -> None:
        """Set memory aside; pages are committed as they are used.

        Args:
            dtype: of the KV.
            link_bytes_per_s: rate of the host link in each direction; None: no limit.
            threads: that one torch operation of the compute stream uses; None: as torch chooses.
            poisons: overwrite staging buffers with NaN once they have been read.
            chunk_slots: by which the host pool's memory is given back; None: the usual.
            checks_copies: compare checksums of what was copied with those of its source.
        """
        self.arena = AliasedArena(
            layout, device_slots=device_slots, staging_slots=host_slots, dtype=dtype
        )
        self.memory = MemoryPlan(
            layout=layout,
            device_slots=device_slots,
            first_staging_slot=self.arena.first_staging_slot,
            staging_slots=host_slots,
            host_slots=host_slots,
            first_host_slots=host_slots,
            chunk_slots=chunk_slots_of(layout, host_slots) if chunk_slots is None else chunk_slots,
        )
        self.compute = CpuStream("compute")
        self.h2d = CpuStream("h2d")
        self.d2h = CpuStream("d2h")
        self._pool = CpuPool(layout, host_slots)
        self._copies = CpuCopies(
            self.arena,
            self._pool,
            layout,
            link_bytes_per_s=link_bytes_per_s,
            checks=checks_copies,
        )
        self._pool_watcher: Callable[[int, str | None], None] | None = None
        self._threads = threads
        self._poisons = poisons
        self._runner: ModelRunner | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def load(self, runner: ModelRunner) -> None:
        """The model that passes run; before the first pass."""
        self._runner = runner

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        for stream in self._streams:
            stream.start()
        if self._threads is not None:
            # Counts for the thread that calls it, and for threads that torch meets later.
            self.compute.put(partial(torch.set_num_threads, self._threads))

    @property
    def _streams(self) -> tuple[CpuStream, ...]:
        return (self.compute, self.h2d, self.d2h)

    def launch(self, issue: Callable[[], None]) -> None:
        # Issuing is only handing closures to the streams' threads: the loop may do it.
        issue()

    # --- compute ----------------------------------------------------------------------------

    def begin_pass(self, command: RunIteration) -> CpuPass:
        forward = CpuPass(command)

        def begin() -> None:
            forward.model_pass = self._model.begin(command)

        self.compute.put(begin)
        return forward

    def run_layers(self, forward: Pass, layers: range, *, is_staged: bool) -> None:
        assert isinstance(forward, CpuPass)

        def run() -> None:
            assert forward.model_pass is not None
            self._model.run_layers(forward.model_pass, layers)
            if is_staged and self._poisons:
                for layer in layers:
                    self.arena.layers[layer][self.arena.first_staging_slot :].fill_(float("nan"))

        self.compute.put(run)

    def sample(self, forward: Pass) -> None:
        assert isinstance(forward, CpuPass)

        def sample() -> None:
            assert forward.model_pass is not None
            self._model.sample(forward.model_pass)
            forward.model_pass.collect()

        self.compute.put(sample)

    @property
    def _model(self) -> ModelRunner:
        assert self._runner is not None, "load() comes before the first pass"
        return self._runner

    # --- copies -----------------------------------------------------------------------------

    def stage(self, layers: range, runs: Sequence[CopyRun]) -> None:
        self._copy(self.h2d, "stage", layers, runs)

    def write_back(self, layers: range, runs: Sequence[CopyRun]) -> None:
        self.d2h.put(partial(self._copies.write_back, layers, runs))

    def promote(self, moves: Sequence[BlockMove]) -> None:
        self._copy(self.h2d, "promote", range(self.memory.layout.num_layers), runs_of(moves))

    def demote(self, moves: Sequence[BlockMove]) -> None:
        self._copy(self.d2h, "demote", range(self.memory.layout.num_layers), runs_of(moves))

    def _copy(
        self, stream: CpuStream, kind: CopyKind, layers: range, runs: Sequence[CopyRun]
    ) -> None:
        stream.put(partial(self._copies.copy, stream.attempts, kind, layers, runs))

    @property
    def tamper(self) -> Tamper | None:
        return self._copies.tamper

    @tamper.setter
    def tamper(self, tamper: Tamper | None) -> None:
        self._copies.tamper = tamper

    # --- completions ------------------------------------------------------------------------

    def notify(self, event: Event, callback: Callable[[BaseException | None], None]) -> None:
        loop = self._loop
        assert loop is not None, "start() comes before notify()"
        assert isinstance(event, CpuEvent)

        def announce(fired: CpuEvent) -> None:
            fault = fired.fault
            if fault is not None and not isinstance(fault, DeviceFault):
                fault = DeviceFault(
                    f"the {fired.stream.name} stream failed: {type(fault).__name__}: {fault}"
                )
                fault.__cause__ = fired.fault
            try:
                loop.call_soon_threadsafe(callback, fault)
            except RuntimeError:
                if not loop.is_closed():
                    raise  # with the loop gone nobody is left to be told

        event.listen(announce)

    def span(self, first: Event, last: Event) -> Span:
        assert isinstance(first, CpuEvent) and isinstance(last, CpuEvent)
        busy_s, waited_s = last.busy_s - first.busy_s, last.waited_s - first.waited_s
        attempts = first.stream.attempts.between(first.attempts, last.attempts)
        return Span(busy_s, waited_s, *attempts, elapsed_s=last.at_s - first.at_s)

    def watch_pool(self, grown: Callable[[int, str | None], None]) -> None:
        """All of the pool is there from the start."""
        self._pool_watcher = grown

    def resize_pool(self, slots: int) -> None:
        # On the thread of a copy stream, behind what was issued: the kernel takes a while.
        self.d2h.put(partial(self._pool.resize, slots))
        self.notify(self.d2h.record(), partial(self._resized, slots))

    def _resized(self, slots: int, fault: BaseException | None) -> None:
        if fault is None and self._pool_watcher is not None:
            self._pool_watcher(slots, None)

    async def drain(self) -> None:
        for stream in self._streams:
            idle: asyncio.Future[BaseException | None] = asyncio.Future()
            self.notify(stream.record(), idle.set_result)
            await idle

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        # Whoever keeps the engine, to ask for its statistics say, must not keep the memory.
        self._runner = None
        self.arena.layers.clear()
        self._pool.close()
