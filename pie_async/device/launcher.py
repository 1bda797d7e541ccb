"""Issues the actors' commands to a device, in an order that is right on every device.

The actors decide, one launch thread issues (DESIGN: "Issue order"): an iteration's launch half
comes from the compute actor, its staging half from swap-in; they are paired by iteration
number and issued interleaved, layer group by layer group, so that every event is recorded
before it is waited on. From then on events alone order the streams.

For layer group g: h2d waits until the ring buffers' last readers have computed, copies,
records; compute waits for that record, runs the group, records. The first groups of an
iteration are therefore staged while the last groups of the one before still compute.

Past KV never changes, so nothing is copied back. The paper's exchange, which does that after every
group, can be switched on for measurements: d2h waits for the group, copies it back and records; who
stages into its ring buffers next waits for that instead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from pie_async.device.protocol import CopyResult, Device, Event, Pass, PassResult, Stream
from pie_async.errors import DeviceFault
from pie_async.ids import IterationId
from pie_async.messages import BlockMove, RunIteration, StageIteration

T = TypeVar("T")


class Launcher:
    """The three queues of `device/protocol.py` in one: what all actors together may ask."""

    def __init__(
        self, device: Device, loop: asyncio.AbstractEventLoop, *, exchanges: bool = False
    ) -> None:
        """Args:
        exchanges: copy staged KV back to the pool after every layer group.
        """
        self._device = device
        self._layout = device.memory.layout
        self._loop = loop
        self._steps: deque[Callable[[], bool]] = deque()
        """Of iterations, in order; each says whether it was issued, or still lacks something."""
        self._masked: set[IterationId] = set()
        """Iterations whose masks came; they are to be sampled."""
        self._staging: dict[IterationId, tuple[StageIteration, asyncio.Future[CopyResult]]] = {}
        self._exchanges = exchanges
        # Launch thread only: per ring buffer, when its last reader is done with it.
        self._released: list[Event | None] = [None] * self._layout.ring_layers
        self._written_back: Event | None = None
        self._sampling: Callable[[], None] | None = None  # of the iteration that awaits masks

    # --- called on the event loop ---------------------------------------------------------

    def run(self, command: RunIteration) -> asyncio.Future[PassResult]:
        ran: asyncio.Future[PassResult] = self._future()
        self._steps.append(partial(self._try_run, command, ran))
        if command.awaits_masks:
            self._steps.append(partial(self._try_sample, command.iteration, ran))
        self._issue_steps()
        return ran

    def sample(self, iteration: IterationId) -> None:
        self._masked.add(iteration)
        self._issue_steps()

    def stage(self, command: StageIteration) -> asyncio.Future[CopyResult]:
        staged: asyncio.Future[CopyResult] = self._future()
        self._staging[command.iteration] = (command, staged)
        self._issue_steps()
        return staged

    def promote(self, moves: Sequence[BlockMove]) -> asyncio.Future[CopyResult]:
        return self._copy(self._device.h2d, self._promote, moves)

    def demote(self, moves: Sequence[BlockMove]) -> asyncio.Future[CopyResult]:
        return self._copy(self._device.d2h, self._device.demote, moves)

    def resize_pool(self, slots: int) -> None:
        self._device.resize_pool(slots)

    def _issue_steps(self) -> None:
        while self._steps and self._steps[0]():
            self._steps.popleft()

    def _try_run(self, command: RunIteration, ran: asyncio.Future[PassResult]) -> bool:
        """Issue an iteration if both its halves are here."""
        if not command.is_staged:
            self._launch(partial(self._issue_resident, command, ran), ran)
        elif command.iteration in self._staging:
            stage, staged = self._staging.pop(command.iteration)
            self._launch(partial(self._issue_staged, command, stage, ran, staged), ran, staged)
        else:
            return False
        return True

    def _try_sample(self, iteration: IterationId, ran: asyncio.Future[PassResult]) -> bool:
        """Issue the sampling of an iteration if its masks are there."""
        if iteration not in self._masked:
            return False
        self._masked.remove(iteration)
        self._launch(self._issue_sampling, ran)
        return True

    def _copy(
        self,
        stream: Stream,
        copy: Callable[[Sequence[BlockMove]], None],
        moves: Sequence[BlockMove],
    ) -> asyncio.Future[CopyResult]:
        copied: asyncio.Future[CopyResult] = self._future()

        def issue() -> None:
            began = stream.record()
            copy(moves)
            done = stream.record()
            num_bytes = len(moves) * self._layout.block_bytes
            self._announce(done, copied, lambda: self._copy_result(began, done, num_bytes))

        self._launch(issue, copied)
        return copied

    def _future(self) -> asyncio.Future[Any]:
        """A future whose failure may go unread: one fault fails many, and one of them stops
        the engine before the others are looked at."""
        future: asyncio.Future[Any] = self._loop.create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return future

    # --- called on the launch thread --------------------------------------------------------

    def _issue_resident(self, command: RunIteration, ran: asyncio.Future[PassResult]) -> None:
        """All layers at once: nothing is awaited between them."""
        device = self._device
        began = device.compute.record()
        forward = device.begin_pass(command)
        device.run_layers(forward, range(self._layout.num_layers), is_staged=False)
        self._finish(command, began, forward, ran)

    def _issue_staged(
        self,
        command: RunIteration,
        stage: StageIteration,
        ran: asyncio.Future[PassResult],
        staged: asyncio.Future[CopyResult],
    ) -> None:
        """Staging is issued as far ahead as the ring reaches: launching a prompt's kernels takes
        the host as long as the GPU runs them, and copies issued in step would all be late."""
        device, layout = self._device, self._layout
        staging_began = device.h2d.record()
        groups = [layout.group(number) for number in range(layout.num_groups)]
        staged_groups = [self._stage_group(each, stage) for each in groups[: layout.ring_depth]]
        began = device.compute.record()
        forward = device.begin_pass(command)
        for number, layers in enumerate(groups):
            device.compute.wait(staged_groups[number])
            device.run_layers(forward, layers, is_staged=True)
            released = self._release(layers, stage)
            for layer in layers:
                self._released[layout.ring_buffer(layer)] = released
            if len(staged_groups) < len(groups):
                staged_groups.append(self._stage_group(groups[len(staged_groups)], stage))
        num_bytes = sum(run.count for run in stage.runs) * layout.block_bytes
        last = staged_groups[-1]
        back_bytes = num_bytes if self._exchanges else 0
        self._announce(
            last, staged, lambda: self._copy_result(staging_began, last, num_bytes, back_bytes)
        )
        self._finish(command, began, forward, ran, staging=(staging_began, last))

    def _stage_group(self, layers: range, stage: StageIteration) -> Event:
        h2d = self._device.h2d
        buffers = map(self._layout.ring_buffer, layers)
        for last_use in dict.fromkeys(self._released[buffer] for buffer in buffers):
            if last_use is not None:
                h2d.wait(last_use)
        self._device.stage(layers, stage.runs)
        return h2d.record()

    def _release(self, layers: range, stage: StageIteration) -> Event:
        """When the ring buffers of a group whose layers were issued may be overwritten."""
        computed = self._device.compute.record()
        if not self._exchanges:
            return computed
        d2h = self._device.d2h
        d2h.wait(computed)
        self._device.write_back(layers, stage.runs)
        self._written_back = d2h.record()
        return self._written_back

    def _promote(self, moves: Sequence[BlockMove]) -> None:
        if self._written_back is not None:
            self._device.h2d.wait(self._written_back)
        self._device.promote(moves)

    def _finish(
        self,
        command: RunIteration,
        began: Event,
        forward: Pass,
        ran: asyncio.Future[PassResult],
        *,
        staging: tuple[Event, Event] | None = None,
    ) -> None:
        """Once its masks are there.

        Args:
            staging: the events around the iteration's copies, which have fired before its last.
        """
        compute = self._device.compute

        def sample(*before: tuple[Event, Event], resumed: Event) -> None:
            self._device.sample(forward)
            done = compute.record()
            parts = (*before, (resumed, done))
            self._announce(done, ran, lambda: self._pass_result(parts, forward, staging))

        if command.awaits_masks:
            layers = began, compute.record()
            self._sampling = lambda: sample(layers, resumed=compute.record())
        else:
            sample(resumed=began)

    def _issue_sampling(self) -> None:
        sample, self._sampling = self._sampling, None
        if sample is not None:  # else what came before could not be issued, and has told so
            sample()

    # --- completions ------------------------------------------------------------------------

    def _launch(self, issue: Callable[[], None], *futures: asyncio.Future[Any]) -> None:
        """Issue on the launch thread; if that fails, so do the futures."""

        def guarded() -> None:
            try:
                issue()
            except Exception as error:  # handed on to whoever awaits
                for future in futures:
                    self._loop.call_soon_threadsafe(_fail, future, error)

        self._device.launch(guarded)

    def _announce(self, event: Event, future: asyncio.Future[T], read: Callable[[], T]) -> None:
        """Once `event` fires, give `future` what `read` then returns."""

        def settle(fault: BaseException | None) -> None:
            if future.done():
                return  # cancelled, or failed while the rest was issued
            if fault is not None:
                _fail(future, fault)
            else:
                future.set_result(read())

        self._device.notify(event, settle)

    def _pass_result(
        self,
        parts: Sequence[tuple[Event, Event]],
        forward: Pass,
        staging: tuple[Event, Event] | None,
    ) -> PassResult:
        """Args:
        parts: the events around each part of the iteration; masks were waited for in between.
        """
        spans = [self._device.span(*part) for part in parts]
        waits = [self._device.span(end, start) for (_, end), (start, _) in pairwise(parts)]
        return PassResult(
            sampled=forward.sampled,
            prompt_logprobs=forward.prompt_logprobs,
            compute_s=sum(span.busy_s for span in spans),
            stall_s=sum(span.waited_s for span in spans),
            mask_wait_s=sum(wait.elapsed_s for wait in waits),
            unstaged=self._device.span(*staging).damaged if staging else (),
        )

    def _copy_result(
        self, began: Event, done: Event, num_bytes: int, written_back_bytes: int = 0
    ) -> CopyResult:
        span = self._device.span(began, done)
        return CopyResult(
            copied_bytes=num_bytes,
            busy_s=span.busy_s,
            written_back_bytes=written_back_bytes,
            failed_attempts=span.failed_attempts,
            damaged=span.damaged,
        )


def _fail(future: asyncio.Future[Any], fault: BaseException) -> None:
    if not future.done():
        future.set_exception(fault if isinstance(fault, DeviceFault) else _as_device_fault(fault))


def _as_device_fault(error: BaseException) -> DeviceFault:
    fault = DeviceFault(f"device work failed: {type(error).__name__}: {error}")
    fault.__cause__ = error
    return fault
