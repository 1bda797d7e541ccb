"""An NVIDIA GPU as a device.

Three CUDA streams; one launch thread that issues to all of them and never waits for the GPU;
one thread per stream that sleeps until an event fires. Built as `device/cpu.py` is, so the two
can be read side by side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pie_async.core.layout import KvLayout
from pie_async.cuda.block_copy import Pieces, find_pieces, to_device, to_host
from pie_async.cuda.checksums import Checksums
from pie_async.cuda.event_waiter import EventWaiter
from pie_async.cuda.host_arena import CHUNK_BYTES, HostArena
from pie_async.cuda.peer_arena import PeerArena
from pie_async.cuda.pool_arena import PoolArena
from pie_async.cuda.streams import CudaEvent, CudaStream
from pie_async.cuda.vmm import DeviceArena
from pie_async.device.attempts import Tamper
from pie_async.device.copy_runs import host_slots_of, runs_of
from pie_async.device.protocol import Event, MemoryPlan, Pass, Span
from pie_async.errors import DeviceFault
from pie_async.messages import BlockMove, CopyRun, PromptLogprobs, RunIteration, SampledToken
from pie_async.runtime.faults import CopyKind
from pie_async.runtime.launch_thread import LaunchThread, Work

if TYPE_CHECKING:
    from pie_async.cuda.driver import Copies, Driver
    from pie_async.model.lanes import Results

LayOut = Callable[[DeviceArena, range, Pieces], "Copies"]


class Runner(Protocol):
    """Runs a model over the arena's layers; never waits for the GPU."""

    def warm_up(self) -> None:
        """Compile and capture what most iterations need."""

    @property
    def wants_graphs(self) -> bool:
        """Whether `capture_wanted` has something to do."""

    def capture_wanted(self) -> None:
        """Capture what iterations lacked; while none is being launched."""

    def begin(self, command: RunIteration) -> Results: ...
    def run_layers(self, forward: Any, layers: range) -> None: ...
    def sample(self, forward: Any) -> None: ...
    def close(self) -> None:
        """Free what is not torch's to free, and let go of the weights; no iteration is left."""


class CudaPass:
    """One iteration on its way through the compute stream."""

    def __init__(self, command: RunIteration) -> None:
        self.command = command
        self.model_pass: Results | None = None

    @property
    def sampled(self) -> tuple[SampledToken, ...]:
        return self._collected.sampled

    @property
    def prompt_logprobs(self) -> tuple[PromptLogprobs, ...]:
        return self._collected.prompt_logprobs

    @property
    def _collected(self) -> Results:
        assert self.model_pass is not None
        self.model_pass.collect()
        return self.model_pass


class CudaDevice:
    """Implements `device/protocol.py` with CUDA.

    The caller builds the model runner over `arena.layers` and hands it in with `load`.
    """

    def __init__(
        self,
        driver: Driver,
        layout: KvLayout,
        *,
        device_slots: int,
        host_slots: int,
        staging_slots: int,
        dtype: torch.dtype,
        poisons: bool = False,
        checks_copies: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
        in_neighbour: bool = False,
    ) -> None:
        """Set memory aside.

        Args:
            driver: of the GPU; closed with the device.
            staging_slots: most blocks that one iteration may stream.
            dtype: of the KV.
            poisons: overwrite staging buffers with NaN once they have been read.
            checks_copies: compare checksums of blocks that come from the pool with those of what
                went there. Wrong ones are told of, not copied again: by then they may be read.
            chunk_bytes: that the host pool is pinned in.
            in_neighbour: the pool lies in the GPU that the driver has opened beside this one.

        Raises:
            ConfigError: the card has too little memory, or the pool cannot be had.
        """
        self._driver = driver
        self.arena = DeviceArena(
            driver, layout, device_slots=device_slots, staging_slots=staging_slots, dtype=dtype
        )
        try:
            self._pool: PoolArena = (
                PeerArena(driver, layout, slots=host_slots)
                if in_neighbour
                else HostArena(driver, layout, slots=host_slots, chunk_bytes=chunk_bytes)
            )
        except Exception:
            self.arena.close()
            raise
        self.memory = MemoryPlan(
            layout=layout,
            device_slots=device_slots,
            first_staging_slot=self.arena.first_staging_slot,
            staging_slots=staging_slots,
            host_slots=host_slots,
            first_host_slots=self._pool.pinned_slots,
            chunk_slots=self._pool.chunk_slots,
        )
        self.compute = CudaStream("compute", driver)
        self.h2d = CudaStream("h2d", driver)
        self.d2h = CudaStream("d2h", driver)
        self._waiters = {
            stream: EventWaiter(stream, driver) for stream in (self.compute, self.h2d, self.d2h)
        }
        self._poisons = poisons
        self._checksums = (
            Checksums(self.arena.layers, host_slots=host_slots) if checks_copies else None
        )
        # Launch thread only: the runs that were copied last, and where they lie in the pool.
        self._found: tuple[Sequence[CopyRun], Pieces] | None = None
        self.tamper: Tamper | None = None
        self._runner: Runner | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._launching = LaunchThread(enter=driver.enter_thread)

    def load(self, runner: Runner) -> None:
        """The model that passes run; before `start`. Its parameters are filled."""
        self._driver.synchronize_device()  # they were on torch's own stream
        with self._driver.torch_on(self.compute.handle):
            runner.warm_up()
        self._runner = runner

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        for waiter in self._waiters.values():
            waiter.start(loop)
        self._launching.start()

    def launch(self, issue: Work) -> None:
        self._launching.launch(issue)

    # --- compute ----------------------------------------------------------------------------

    def begin_pass(self, command: RunIteration) -> CudaPass:
        forward = CudaPass(command)

        def begin() -> None:
            forward.model_pass = self._model.begin(command)

        self._compute(begin)
        return forward

    def run_layers(self, forward: Pass, layers: range, *, is_staged: bool) -> None:
        def run() -> None:
            self._model.run_layers(_model_pass(forward), layers)
            if is_staged and self._poisons:
                first = self.arena.first_staging_slot
                for layer in layers:
                    staging = self.arena.layers[layer][first : first + self.arena.staging_slots]
                    staging.fill_(float("nan"))

        self._compute(run)

    def sample(self, forward: Pass) -> None:
        self._compute(lambda: self._model.sample(_model_pass(forward)))
        if self._model.wants_graphs:
            # Once this iteration's last event is recorded: its time is to be its own. And before
            # the next one is begun, whose numbers lie where capturing puts its own until it has
            # been sampled.
            self._launching.follow(lambda: self._compute(self._model.capture_wanted))

    def _compute(self, work: Work) -> None:
        """Issue torch operations to the compute stream."""
        self._issue_torch(self.compute, work)

    def _issue_torch(self, stream: CudaStream, work: Work) -> None:
        if stream.fault is not None:
            return
        stream.note_work()
        try:
            with self._driver.torch_on(stream.handle), torch.inference_mode():
                work()
        except Exception as error:  # surfaces at the next event
            stream.fail(error)

    @property
    def _model(self) -> Runner:
        assert self._runner is not None, "load() comes before the first pass"
        return self._runner

    # --- copies -----------------------------------------------------------------------------

    def stage(self, layers: range, runs: Sequence[CopyRun]) -> None:
        self._copy(self.h2d, "stage", layers, runs)

    def write_back(self, layers: range, runs: Sequence[CopyRun]) -> None:
        self._issue(self.d2h, to_host, layers, runs)

    def promote(self, moves: Sequence[BlockMove]) -> None:
        self._copy(self.h2d, "promote", self._layers, runs_of(moves))

    def demote(self, moves: Sequence[BlockMove]) -> None:
        self._copy(self.d2h, "demote", self._layers, runs_of(moves))

    @property
    def _layers(self) -> range:
        return range(self.memory.layout.num_layers)

    def _copy(
        self, stream: CudaStream, kind: CopyKind, layers: range, runs: Sequence[CopyRun]
    ) -> None:
        if stream.fault is not None:
            return
        for _ in stream.attempts.numbers():
            outcome = "arrives" if self.tamper is None else self.tamper(kind)
            if outcome != "fails":
                break
        else:
            stream.attempts.give_up(host_slots_of(runs))
            return
        lay_out: LayOut = to_host if kind == "demote" else to_device
        if outcome == "corrupted":
            lay_out = _shifted(lay_out, self.memory.layout.item_bytes)
        sums = self._checksums
        if sums is not None and kind == "demote":
            self._issue_torch(stream, partial(sums.remember, layers, runs))
        self._issue(stream, lay_out, layers, runs)
        if sums is not None and kind != "demote":
            self._issue_torch(stream, partial(_compare, sums, stream, layers, runs))

    def _issue(
        self, stream: CudaStream, lay_out: LayOut, layers: range, runs: Sequence[CopyRun]
    ) -> None:
        if stream.fault is not None:
            return
        stream.note_work()
        try:
            copies = lay_out(self.arena, layers, self._pieces(runs))
            self._driver.copy(copies, stream.handle)
        except Exception as error:  # surfaces at the next event
            stream.fail(error)

    def _pieces(self, runs: Sequence[CopyRun]) -> Pieces:
        """Looked for once by iteration: all its layer groups copy the same runs, and a hundred of
        them, found anew for each of eight groups, take as long as the GPU takes for a group."""
        if self._found is None or self._found[0] is not runs:
            self._found = (runs, find_pieces(self._pool, runs))
        return self._found[1]

    # --- completions ------------------------------------------------------------------------

    def notify(self, event: Event, callback: Callable[[BaseException | None], None]) -> None:
        assert isinstance(event, CudaEvent)
        self._waiters[event.stream].notify(event, callback)

    def span(self, first: Event, last: Event) -> Span:
        assert isinstance(first, CudaEvent) and isinstance(last, CudaEvent)
        busy_s, waited_s = last.busy_s - first.busy_s, last.waited_s - first.waited_s
        attempts = first.stream.attempts.between(first.attempts, last.attempts)
        return Span(busy_s, waited_s, *attempts, elapsed_s=busy_s + waited_s)

    def watch_pool(self, grown: Callable[[int, str | None], None]) -> None:
        loop = self._loop
        assert loop is not None, "start() comes first"

        def tell(slots: int, refusal: str | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(grown, slots, refusal)

        self._pool.watch(tell)

    def resize_pool(self, slots: int) -> None:
        self._pool.resize(slots)

    async def drain(self) -> None:
        loop = asyncio.get_running_loop()
        for stream in self._waiters:
            idle: asyncio.Future[BaseException | None] = loop.create_future()
            self.launch(lambda s=stream, i=idle: self.notify(s.record(), i.set_result))  # type: ignore[misc]
            await idle

    def close(self) -> None:
        self._launching.close()
        for waiter in self._waiters.values():
            waiter.close()
        # A context that is lost refuses to free what is lost with it.
        with suppress(DeviceFault):
            self._free()

    def _free(self) -> None:
        self._driver.enter_thread()
        for stream in self._waiters:
            self._driver.synchronize_stream(stream.handle)
            # torch may still hold memory that it used on a stream, and pinned memory is given
            # back with an event on it: destroyed, that would be the end of the process.
            stream.close(is_kept=stream is self.compute or self._checksums is not None)
        if self._runner is not None:
            self._runner.close()
            self._runner = None
        self._checksums = None
        self._pool.close()
        self.arena.close()
        self._driver.close()


def _shifted(lay_out: LayOut, item_bytes: int) -> LayOut:
    """Copies the first of which arrives shifted by one number: all of it wrong, and finite."""

    def found(arena: DeviceArena, layers: range, pieces: Pieces) -> Copies:
        copies = lay_out(arena, layers, pieces)
        copies[0, 0] += item_bytes
        copies[2, 0] -= item_bytes
        return copies

    return found


def _compare(sums: Checksums, stream: CudaStream, layers: range, runs: Sequence[CopyRun]) -> None:
    """Have the stream tell which blocks arrived wrong."""
    for slots, is_wrong in sums.compare(layers, runs):
        stream.attempts.will_tell(slots, is_wrong)


def _model_pass(forward: Pass) -> Results:
    assert isinstance(forward, CudaPass)
    assert forward.model_pass is not None
    return forward.model_pass
