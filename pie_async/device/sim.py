"""A device on virtual time: a cost model instead of kernels, tags instead of tensors.

Every stream has the time at which it becomes free. Because an event is recorded before it is
waited for, the time of every event is known when it is recorded; nothing has to be simulated
ahead, and the event loop only sees the completions it asked for.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence

from pie_async.config import GIB
from pie_async.core.batch_shapes import SPARE_ROWS, BatchShape
from pie_async.device.attempts import Attempts, Outcome, Tamper
from pie_async.device.copy_runs import host_slots_of
from pie_async.device.cost_model import CostModel, Work
from pie_async.device.happens_before import Clock
from pie_async.device.protocol import Event, MemoryPlan, Pass, Span
from pie_async.device.sim_checker import CheckedPass, FedRow, KvChecker, check_rows
from pie_async.device.sim_memory import STREAMS
from pie_async.device.sim_sampler import EndOfSequence, SimSampler
from pie_async.errors import ConfigError, DeviceFault
from pie_async.messages import (
    BlockMove,
    CopyRun,
    PromptLogprobs,
    Row,
    RunIteration,
    SampledToken,
)
from pie_async.runtime.faults import CopyKind

_EPSILON_S = 1e-9
_PIN_S_PER_BYTE = 0.4 / GIB
"""Measured on a host of H200s."""


Callback = Callable[[BaseException | None], None]


class SimEvent:
    """A point in a stream's order, with its time."""

    __slots__ = ("at_s", "attempts", "busy_s", "clock", "failure", "stream", "waited_s")

    def __init__(self, stream: SimStream, clock: Clock) -> None:
        self.stream = stream
        self.clock = clock
        self.at_s = stream.free_at_s
        self.busy_s = stream.busy_s
        self.waited_s = stream.waited_s
        self.failure = stream.failure
        self.attempts = stream.attempts.mark()

    def __repr__(self) -> str:
        return f"<event of {self.stream.name} at {self.at_s:.9f} s>"


class SimStream:
    """Work in order of issue, as the time at which it will all be done."""

    __slots__ = ("attempts", "busy_s", "failure", "free_at_s", "index", "name", "owner", "waited_s")

    def __init__(self, index: int, owner: SimDevice) -> None:
        self.index = index
        self.name = STREAMS[index]
        self.owner = owner
        self.free_at_s = 0.0
        self.busy_s = 0.0
        self.waited_s = 0.0
        self.failure: BaseException | None = None
        self.attempts = Attempts()

    def record(self) -> SimEvent:
        """See `Stream`."""
        checker = self.owner.checker
        return SimEvent(self, () if checker is None else checker.memory.record(self.index))

    def wait(self, event: Event) -> None:
        """See `Stream`.

        Raises:
            DeviceFault: the event was not recorded on this device.
        """
        if not isinstance(event, SimEvent) or event.stream.owner is not self.owner:
            raise DeviceFault(
                f"{self.name} waits for {event!r}, which was never recorded on this device; "
                "record an event before anything waits for it"
            )
        if event.at_s > self.free_at_s:
            self.waited_s += event.at_s - self.free_at_s
            self.free_at_s = event.at_s
        if event.failure is not None:
            self.failure = event.failure
        if self.owner.checker is not None:
            self.owner.checker.memory.wait(self.index, event.clock)

    def work(self, seconds: float) -> None:
        """Issue work that takes this long."""
        self.busy_s += seconds
        self.free_at_s += seconds

    delay = work


class SimPass:
    """One iteration's forward pass, as what it costs and samples."""

    __slots__ = (
        "_device",
        "_prompt_logprobs",
        "_sampled",
        "checked",
        "command",
        "head_s",
        "layer_s",
        "sampled_at_s",
    )

    def __init__(self, device: SimDevice, command: RunIteration, work: Work) -> None:
        self._device = device
        self.command = command
        self.layer_s = device.cost.layer_s(work)
        self.head_s = device.cost.head_s(work)
        self.sampled_at_s: float | None = None
        self._sampled: tuple[SampledToken, ...] = ()
        self._prompt_logprobs: tuple[PromptLogprobs, ...] = ()
        self.checked: CheckedPass | None = None

    @property
    def sampled(self) -> tuple[SampledToken, ...]:
        """See `Pass`; raises DeviceFault when read too early."""
        self._device.require_reached(self.sampled_at_s, self.command)
        return self._sampled

    @property
    def prompt_logprobs(self) -> tuple[PromptLogprobs, ...]:
        """See `Pass`; raises DeviceFault when read too early."""
        self._device.require_reached(self.sampled_at_s, self.command)
        return self._prompt_logprobs

    def set_results(
        self,
        sampled: tuple[SampledToken, ...],
        prompt_logprobs: tuple[PromptLogprobs, ...],
        at_s: float,
    ) -> None:
        self._sampled = sampled
        self._prompt_logprobs = prompt_logprobs
        self.sampled_at_s = at_s


class SimDevice:
    """`Device` without a device.

    Tokens depend on the sequence's seed and the position alone, so that runs that batch or
    place differently can be compared token by token.

    Args:
        checked: follow contents, block tables and order of all accesses, and raise
            `DeviceFault` where a real device would silently compute on wrong KV. Costs host
            time in proportion to blocks times layers.
        is_order_checked: with `checked`, also require that events order every conflict,
            whether or not the timing happened to fit.
        end: how sequences end by themselves; never, unless told.
        checks_copies: notice copies that arrive corrupted, as checksums would.
    """

    def __init__(
        self,
        *,
        memory: MemoryPlan,
        cost: CostModel,
        seed: int = 0,
        vocab_size: int | None = None,
        end: EndOfSequence | None = None,
        checked: bool = False,
        is_order_checked: bool = True,
        checks_copies: bool = False,
        padded: Callable[[Sequence[Row]], BatchShape | None] = lambda _rows: None,
    ) -> None:
        """
        Args:
            padded: the sizes that an iteration of these rows is padded to; None: none.
        """
        if memory.layout.num_layers != cost.shape.num_layers:
            raise ConfigError(
                f"the KV layout has {memory.layout.num_layers} layers, the model shape "
                f"{cost.shape.num_layers}; derive both from one model",
                option="model",
            )
        self.cost = cost
        self.checker = KvChecker(memory, is_order_checked=is_order_checked) if checked else None
        self._memory = memory
        self.sampler = SimSampler(
            seed=seed,
            vocab_size=vocab_size or cost.shape.vocab_size,
            end=end or EndOfSequence(),
        )
        self.use_masks = self.sampler.use_masks
        self._streams = tuple(SimStream(index, self) for index in range(len(STREAMS)))
        self._compute, self._h2d, self._d2h = self._streams
        self._loop: asyncio.AbstractEventLoop | None = None
        self._observed_s = 0.0
        self._announcements: list[tuple[float, int, SimEvent, Callback]] = []
        self._numbers = itertools.count()  # equal times: first come, first announced
        self._staged: tuple[Sequence[CopyRun], int] = ((), 0)
        self._staging_s = 0.0
        self.pool_slots = memory.host_slots
        """Of the host pool that have memory."""
        self._pool_watcher: Callable[[int, str | None], None] | None = None
        self.tamper: Tamper | None = None
        self._checks_copies = checks_copies
        self._padded = padded

    @property
    def memory(self) -> MemoryPlan:
        return self._memory

    @property
    def compute(self) -> SimStream:
        return self._compute

    @property
    def h2d(self) -> SimStream:
        return self._h2d

    @property
    def d2h(self) -> SimStream:
        return self._d2h

    # --- life -------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """See `Device`."""
        self._loop = loop

    def launch(self, issue: Callable[[], None]) -> None:
        """See `Device`; issues inline, at the loop's present time."""
        now_s = self._time_s()
        for stream in self._streams:
            if stream.free_at_s < now_s:
                stream.free_at_s = now_s
        if self.checker is not None:
            self.checker.memory.host_issues()
        issue()

    def notify(self, event: Event, callback: Callback) -> None:
        """See `Device`."""
        assert isinstance(event, SimEvent)
        heapq.heappush(self._announcements, (event.at_s, next(self._numbers), event, callback))
        self._running_loop().call_at(event.at_s, self._announce_until, event.at_s)

    def span(self, first: Event, last: Event) -> Span:
        """See `Device`.

        Raises:
            DeviceFault: the events are of two streams.
        """
        assert isinstance(first, SimEvent)
        assert isinstance(last, SimEvent)
        if first.stream is not last.stream:
            raise DeviceFault(f"there is no span from {first!r} to {last!r}: two streams")
        busy_s, waited_s = last.busy_s - first.busy_s, last.waited_s - first.waited_s
        attempts = first.stream.attempts.between(first.attempts, last.attempts)
        return Span(busy_s, waited_s, *attempts, elapsed_s=last.at_s - first.at_s)

    def fail(self, stream: SimStream, failure: BaseException) -> None:
        """From now on this stream's events fail, and those of streams that wait for them."""
        stream.failure = failure

    def watch_pool(self, grown: Callable[[int, str | None], None]) -> None:
        """See `Device`; all of the pool is there from the start."""
        self._pool_watcher = grown

    def resize_pool(self, slots: int) -> None:
        """See `Device`. New memory takes as long as pinning does, old one goes at once, and copies
        from then on are refused to touch it."""
        added_bytes = max(0, slots - self.pool_slots) * self._memory.layout.block_bytes
        self.pool_slots = min(slots, self.pool_slots)
        loop = self._running_loop()
        loop.call_later(added_bytes * _PIN_S_PER_BYTE, self._resized, slots)

    def _resized(self, slots: int) -> None:
        self.pool_slots = slots
        if self._loop is not None and self._pool_watcher is not None:
            self._pool_watcher(slots, None)

    async def drain(self) -> None:
        """See `Device`."""
        while (left_s := self._last_s() - self._time_s()) > _EPSILON_S:  # noqa: ASYNC110
            await asyncio.sleep(left_s)  # until a known time, in one go
        if self.checker is not None:
            for stream in self._streams:
                self.checker.memory.observe(stream.record().clock)

    def close(self) -> None:
        """See `Device`."""
        self._loop = None
        self._announcements.clear()  # nobody is left to be told

    # --- work -------------------------------------------------------------------------------

    def begin_pass(self, command: RunIteration) -> SimPass:
        """See `Device`."""
        for binding in command.bindings:
            self.sampler.bind(binding)
        work = work_of(command.rows, self._padded(command.rows))
        forward = SimPass(self, command, work)
        if self.checker is not None:
            for binding in command.bindings:
                self.checker.bind(binding)
            for update in command.tables:
                self.checker.update_table(update)
            fed = [FedRow(row, row.tokens or self.sampler.last_token(row)) for row in command.rows]
            rows = tuple(fed)
            check_rows(rows)
            forward.checked = CheckedPass(command.iteration, rows)
        return forward

    def stage(self, layers: range, runs: Sequence[CopyRun]) -> None:
        """See `Device`."""
        if runs is not self._staged[0]:
            self._require_pooled(run.host_slot + run.count for run in runs)
            self._measure_staging(runs)
        copy_s = self.cost.copy_s(len(layers) * self._staged[1], len(runs)) if runs else 0.0
        outcome: Outcome = "arrives"
        if self.tamper is not None:
            outcome = self._attempt(self._h2d, "stage", copy_s)
            if outcome == "fails":
                self._h2d.attempts.give_up(host_slots_of(runs))
                copy_s = 0.0
        start_s = self._h2d.free_at_s
        self._h2d.work(copy_s)
        if self.checker is not None:
            for layer in layers:
                self.checker.stage_layer(layer, runs, start_s, self._h2d.free_at_s, outcome)

    def write_back(self, layers: range, runs: Sequence[CopyRun]) -> None:
        """See `Device`. Reading what is copied slows the layers beside it; that the link is slower
        with both directions busy (52 instead of 55.4 GB/s on PCIe 5) does not count."""
        self._require_pooled(run.host_slot + run.count for run in runs)
        num_bytes = self._staged[1] * len(layers)
        self._compute.work(num_bytes / self.cost.gpu.hbm_bytes_per_s)
        start_s = self._d2h.free_at_s
        if runs:
            self._d2h.work(self.cost.copy_s(num_bytes, len(runs)))
        if self.checker is not None:
            for layer in layers:
                self.checker.write_layer_back(layer, runs, start_s, self._d2h.free_at_s)

    def run_layers(self, forward: Pass, layers: range, *, is_staged: bool) -> None:
        """See `Device`."""
        assert isinstance(forward, SimPass)
        compute = self._compute
        start_s = compute.free_at_s
        layer_s = forward.layer_s + self._staging_s if is_staged else forward.layer_s
        compute.work(len(layers) * layer_s)
        if self.checker is not None and forward.checked is not None:
            self.checker.run_layers(forward.checked, layers, start_s, compute.free_at_s)

    def sample(self, forward: Pass) -> None:
        """See `Device`."""
        assert isinstance(forward, SimPass)
        self._compute.work(forward.head_s)
        rows = forward.command.rows
        garbled = self.checker.damaged if self.checker is not None else frozenset()
        forward.set_results(
            self.sampler.sample(rows, garbled=garbled),
            self.sampler.prompt_logprobs(rows),
            self._compute.free_at_s,
        )

    def promote(self, moves: Sequence[BlockMove]) -> None:
        """See `Device`."""
        self._move(self._h2d, moves)

    def demote(self, moves: Sequence[BlockMove]) -> None:
        """See `Device`."""
        self._move(self._d2h, moves)

    # --- inside -----------------------------------------------------------------------------

    def require_reached(self, at_s: float | None, command: RunIteration) -> None:
        """Results are there when the loop has reached their time.

        Raises:
            DeviceFault: it has not.
        """
        reached_s = max(self._observed_s, self._time_s())
        if at_s is None or at_s > reached_s + _EPSILON_S:
            raise DeviceFault(
                f"the tokens of iteration {command.iteration} were read before an event "
                "recorded after their sampling has fired"
            )

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise DeviceFault("the simulated device is used before start() or after close()")
        return self._loop

    def _last_s(self) -> float:
        return max(stream.free_at_s for stream in self._streams)

    def _time_s(self) -> float:
        return self._running_loop().time()

    def _announce_until(self, at_s: float) -> None:
        """Announce what has fired by then, in order of time: on a real clock timers are only
        roughly on time (uvloop rounds them to milliseconds) and may overtake each other."""
        while self._announcements and self._announcements[0][0] <= at_s:
            _, _, event, callback = heapq.heappop(self._announcements)
            self._observed_s = max(self._observed_s, event.at_s)
            if self.checker is not None:
                self.checker.memory.observe(event.clock)
            callback(event.failure)

    def _require_pooled(self, ends: Iterable[int]) -> None:
        end = max(ends, default=0)
        if end > self.pool_slots:
            raise DeviceFault(
                f"host slot {end - 1} is copied, but the pool has memory for {self.pool_slots}"
            )

    def _measure_staging(self, runs: Sequence[CopyRun]) -> None:
        num_bytes = sum(run.count for run in runs) * self._memory.layout.layer_block_bytes
        self._staged = (runs, num_bytes)
        self._staging_s = self.cost.staging_s(num_bytes)

    def _move(self, stream: SimStream, moves: Sequence[BlockMove]) -> None:
        if not moves:
            return
        self._require_pooled(move.host_slot + 1 for move in moves)
        layout = self._memory.layout
        num_runs = len(moves) * len(layout.stacks)
        copy_s = self.cost.copy_s(len(moves) * layout.block_bytes, num_runs)
        outcome: Outcome = "arrives"
        is_demotion = stream is self._d2h
        if self.tamper is not None:
            outcome = self._attempt(stream, "demote" if is_demotion else "promote", copy_s)
            if outcome == "fails":
                stream.attempts.give_up([move.host_slot for move in moves])
                return
        start_s = stream.free_at_s
        stream.work(copy_s)
        if self.checker is not None:
            self.checker.move(moves, start_s, stream.free_at_s, outcome, is_demotion=is_demotion)

    def _attempt(self, stream: SimStream, kind: CopyKind, copy_s: float) -> Outcome:
        """Spend the time of a copy's failed attempts; how the last one ends."""
        assert self.tamper is not None
        for _ in stream.attempts.numbers():
            outcome = self.tamper(kind)
            if outcome == "arrives" or (outcome == "corrupted" and not self._checks_copies):
                return outcome
            stream.work(copy_s)
        return "fails"


def work_of(rows: Sequence[Row], shape: BatchShape | None = None) -> Work:
    """What these rows make an iteration do; its products have the padded sizes."""
    fed = read = sampled = 0
    attended = 0.0
    for row in rows:
        num_tokens = len(row.tokens) or 1
        end = row.start + num_tokens
        fed += num_tokens
        read += end
        attended += num_tokens * (row.start + end + 1) / 2
        sampled += row.is_sampled
    if shape is not None:
        decode_rows, prompt_tokens = shape
        fed = decode_rows + prompt_tokens
        sampled = decode_rows + (SPARE_ROWS if prompt_tokens else 0)
    return Work(fed, read, attended, sampled)
