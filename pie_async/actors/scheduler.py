"""Owns sequences and block tables: plans iterations, settles their results."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import assert_never

import msgspec

from pie_async.core import invariants
from pie_async.core.batching import IterationPlan, plan_iteration
from pie_async.core.layout import KvLayout
from pie_async.core.schedule import Launched, Schedule
from pie_async.errors import MailboxClosed
from pie_async.ids import IterationId, SequenceId
from pie_async.live.timeline import LimitChange, Span
from pie_async.live.view import EngineView, memory_map, sequence_views
from pie_async.messages import (
    Advance,
    Cancel,
    ComputeMail,
    DeliveryMail,
    Drain,
    Drained,
    ForgetGuides,
    GovernorMail,
    GuideMail,
    IterationObserved,
    IterationRan,
    IterationStaged,
    MakeMasks,
    MasksLate,
    MasksMade,
    PoolGrown,
    PoolShrunk,
    PromptLogprobs,
    ReadingChanged,
    ResizePool,
    ReviewPool,
    RunIteration,
    SampleIteration,
    SchedulerMail,
    SequencesAdvanced,
    SetStreamedLimit,
    StageIteration,
    Submit,
    SwapIn,
    SwapInMail,
    SwapOut,
    SwapOutMail,
    SwappedIn,
    SwappedOut,
)
from pie_async.metrics import EngineStats
from pie_async.runtime.actor import Actor, Observer
from pie_async.runtime.mailbox import Mailbox

NO_ITERATION = IterationId(0)
"""Set in facts that no iteration caused."""
MOST_NEWS = 32
"""Facts that delivery is not told before a plan: its mailbox is bounded."""
LIMITS_KEPT = 12
"""Of the governor's decisions, for whoever looks."""


class Neighbours(msgspec.Struct, frozen=True, kw_only=True):
    """The mailboxes that the scheduler writes to."""

    compute: Mailbox[ComputeMail]
    swap_in: Mailbox[SwapInMail]
    swap_out: Mailbox[SwapOutMail]
    delivery: Mailbox[DeliveryMail]
    governor: Mailbox[GovernorMail] | None
    """None: the streamed limit is fixed."""
    guide: Mailbox[GuideMail] | None = None
    """None: no sequence is guided."""


class SchedulerActor(Actor[SchedulerMail]):
    """Keeps up to `iterations_in_flight` iterations issued while there is work.

    After every message: update the schedule, and once the mailbox is empty, plan, and then tell
    what happened: the device must not wait for what readers are told. All decisions are `core`'s;
    this class carries them to the neighbours.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        iterations_in_flight: int,
        mailbox_capacity: int,
        checks_invariants: bool = False,
        observer: Observer | None = None,
    ) -> None:
        super().__init__("scheduler", capacity=mailbox_capacity, observer=observer)
        self._schedule = schedule
        self._depth = iterations_in_flight
        self._checks_invariants = checks_invariants
        self._neighbours: Neighbours | None = None
        self._next_iteration = 1
        self._is_draining = False
        self._awaiting_staging: dict[IterationId, tuple[Launched, IterationRan]] = {}
        self._staged: dict[IterationId, IterationStaged] = {}
        self._totals = EngineStats()
        self._now_s: Callable[[], float] = time.monotonic
        self._progress_s = 0.0
        """When the oldest iteration in flight came first: loop time."""
        self._took_s = 0.0
        """The last iteration, from first to last."""
        self._limits: deque[LimitChange] = deque(maxlen=LIMITS_KEPT)
        self._unsampled: IterationId | None = None
        """The newest iteration, while it awaits masks: none can follow it."""
        self._awaited: set[SequenceId] = set()
        """Sequences whose masks the next plan waits for."""
        self._waits = 0
        self._news: list[SequencesAdvanced] = []
        """What delivery is to be told."""

    def connect(self, neighbours: Neighbours) -> None:
        """Say where decisions go; before `run`."""
        self._neighbours = neighbours

    async def run(self) -> None:
        """See `Actor`."""
        self._now_s = asyncio.get_running_loop().time
        await super().run()

    def handle(self, mail: SchedulerMail) -> None:
        self._schedule.now_s = self._now_s()
        self._take_in(mail)
        if self._checks_invariants:
            invariants.check(self._schedule)
        if self._unsampled is not None:
            self._sample(self._unsampled)
        # Everything that has arrived takes part in one plan.
        is_time = not len(self.mailbox) and not self._awaited
        if is_time:
            self._plan()
        if is_time or len(self._news) >= MOST_NEWS:
            self._send_news()

    def _take_in(self, mail: SchedulerMail) -> None:
        schedule = self._schedule
        match mail:
            case Submit():
                schedule.submit(mail)
            case Cancel() | ReadingChanged() | Drain():
                self._obey(mail)
            case IterationRan():
                self._settle(mail)
            case IterationStaged():
                self._count_staged(mail)
            case SwappedOut():
                schedule.swapped_out(mail.blocks, mail.failed)
                self._add(
                    d2h_bytes=mail.swapped_bytes,
                    d2h_busy_s=mail.busy_s,
                    copy_attempts_failed=mail.failed_attempts,
                )
            case SwappedIn():
                self._tell(schedule.swapped_in(mail.blocks, mail.failed), NO_ITERATION)
                self._add(
                    h2d_bytes=mail.swapped_bytes,
                    h2d_busy_s=mail.busy_s,
                    copy_attempts_failed=mail.failed_attempts,
                )
            case MasksMade() | MasksLate():
                self._take_masks(mail)
            case SetStreamedLimit():
                self._take_limit(mail)
            case PoolGrown() | PoolShrunk() | ReviewPool():
                self._size_pool(mail)
            case _:
                assert_never(mail)

    def _obey(self, mail: Cancel | ReadingChanged | Drain) -> None:
        match mail:
            case Cancel():
                self._tell(self._schedule.cancel(mail.sequences, mail.reason), NO_ITERATION)
            case ReadingChanged():
                self._schedule.reading_changed(mail.sequences, is_read=mail.is_read)
            case Drain():
                self._is_draining = True
                self._schedule.drain()

    def _take_limit(self, mail: SetStreamedLimit) -> None:
        self._schedule.streamed_limit = mail.limit_blocks
        self._schedule.least_streamed = mail.least_blocks
        self._totals = msgspec.structs.replace(
            self._totals, governor_cause=mail.cause, governor_reason=mail.reason
        )
        self._limits.append(
            LimitChange(
                at_s=self._now_s(),
                limit_blocks=mail.limit_blocks,
                cause=mail.cause,
                reason=mail.reason,
            )
        )

    def _size_pool(self, mail: PoolGrown | PoolShrunk | ReviewPool) -> None:
        size = self._schedule.residency.pool_size
        match mail:
            case PoolGrown():
                self._tell(self._schedule.pool_grown(mail), NO_ITERATION)
            case PoolShrunk():
                size.told(mail.slots, is_all=False)
                if self._schedule.is_resting:
                    self._resize_pool(size.shrink())
            case ReviewPool():
                self._resize_pool(size.review() if self._schedule.is_resting else size.target)

    def _resize_pool(self, slots: int) -> None:
        # Chunks go one after the other also while the engine ends, and swap-out has ended first.
        with contextlib.suppress(MailboxClosed):
            self._to.swap_out.post(ResizePool(slots=slots))

    # --- planning ---------------------------------------------------------------------------

    def _plan(self) -> None:
        schedule = self._schedule
        while self._may_plan:
            plan = plan_iteration(schedule, IterationId(self._next_iteration))
            if self._checks_invariants:
                invariants.check(schedule)
            self._send(plan)
            self._order_masks()
            if not plan.rows:
                break
            self._next_iteration += 1
        if (slots := schedule.residency.pool_size.grow()) is not None:
            self._to.swap_out.post(ResizePool(slots=slots))
        self._order_masks()  # and have the guides of those that ended forgotten
        if self._is_draining and schedule.is_idle and self._is_settled:
            self._is_draining = False
            self._send_news()
            self._to.delivery.post(Drained())

    @property
    def _may_plan(self) -> bool:
        schedule = self._schedule
        has_place = len(schedule.in_flight) < self._depth and self._unsampled is None
        return has_place and not schedule.is_resting

    @property
    def _is_settled(self) -> bool:
        """Nothing that was issued is still to be heard of."""
        schedule = self._schedule
        return not (schedule.in_flight or schedule.has_moves or self._awaiting_staging)

    def _send(self, plan: IterationPlan) -> None:
        to = self._to
        if plan.swap_out:
            to.swap_out.post(SwapOut(moves=tuple(plan.swap_out)))
        if plan.rows:
            if len(self._schedule.in_flight) == 1:
                self._progress_s = self._now_s()
            if plan.runs:
                to.swap_in.post(StageIteration(iteration=plan.iteration, runs=tuple(plan.runs)))
            awaits_masks = bool(self._schedule.guidance.late)
            self._unsampled = plan.iteration if awaits_masks else None
            to.compute.post(
                RunIteration(
                    iteration=plan.iteration,
                    rows=tuple(plan.rows),
                    bindings=tuple(plan.bindings),
                    tables=tuple(plan.tables),
                    is_staged=bool(plan.runs),
                    awaits_masks=awaits_masks,
                )
            )
        if plan.swap_in:
            to.swap_in.post(SwapIn(moves=tuple(plan.swap_in)))

    @property
    def _to(self) -> Neighbours:
        assert self._neighbours is not None, "connect() comes before run()"
        return self._neighbours

    # --- guided sequences ---------------------------------------------------------------------

    def _order_masks(self) -> tuple[SequenceId, ...]:
        """Order what is wanted; whose masks were ordered."""
        if self._to.guide is None:
            return ()
        if ended := self._schedule.guidance.take_ended():
            self._to.guide.post(ForgetGuides(sequences=ended))
        orders = self._schedule.mask_orders()
        if orders:
            self._to.guide.post(MakeMasks(orders=orders))
        return tuple(order.sequence for order in orders)

    def _sample(self, iteration: IterationId) -> None:
        """Have the newest iteration sampled once its masks are made."""
        self._order_masks()
        if not self._schedule.guidance.late:
            self._unsampled = None
            self._to.compute.post(SampleIteration(iteration=iteration))

    def _await_masks(self) -> None:
        """Order masks for those whose tokens have just come, and let the next plan wait for them
        a moment: one that comes too late for it costs its sequence an iteration."""
        self._awaited.update(self._order_masks())
        schedule = self._schedule
        is_idle = not schedule.in_flight and not all(seq.is_guided for seq in schedule.running)
        if not self._awaited or is_idle:
            self._awaited.clear()
            return
        self._waits += 1
        asyncio.get_running_loop().call_later(
            schedule.guidance.patience_s, self._masks_late, self._waits
        )

    def _masks_late(self, number: int) -> None:
        if number == self._waits and self._awaited:
            with contextlib.suppress(MailboxClosed):
                self.mailbox.post(MasksLate(number=number))

    def _take_masks(self, mail: MasksMade | MasksLate) -> None:
        match mail:
            case MasksMade():
                self._awaited.difference_update(mask.sequence for mask in mail.masks)
                self._tell(self._schedule.masks_made(mail.masks), NO_ITERATION)
            case MasksLate():
                if mail.number == self._waits:
                    self._awaited.clear()

    # --- settling ---------------------------------------------------------------------------

    def _settle(self, ran: IterationRan) -> None:
        self._progress_s = self._now_s()
        self._took_s = ran.compute_s + ran.stall_s + ran.mask_wait_s
        launched, advances = self._schedule.settle(ran.iteration, ran.sampled, ran.unstaged)
        self._tell(advances, ran.iteration, ran.prompt_logprobs)
        if self._schedule.guidance.num_guided:
            self._schedule.guidance.iteration_took(ran.compute_s, ran.mask_wait_s)
            self._await_masks()
        self._add(
            iterations=1,
            compute_s=ran.compute_s,
            stall_s=ran.stall_s,
            mask_wait_s=ran.mask_wait_s,
        )
        if launched.is_staged and ran.iteration not in self._staged:
            self._awaiting_staging[ran.iteration] = (launched, ran)
        else:
            self._observe(launched, ran, self._staged.pop(ran.iteration, None))

    def _count_staged(self, staged: IterationStaged) -> None:
        self._add(
            h2d_bytes=staged.staged_bytes,
            h2d_busy_s=staged.busy_s,
            copy_attempts_failed=staged.failed_attempts,
            d2h_bytes=staged.written_back_bytes,
        )
        if staged.iteration in self._awaiting_staging:
            launched, ran = self._awaiting_staging.pop(staged.iteration)
            self._observe(launched, ran, staged)
        else:
            self._staged[staged.iteration] = staged

    def _observe(
        self, launched: Launched, ran: IterationRan, staged: IterationStaged | None
    ) -> None:
        phase = "prefill" if launched.prefill_tokens else "decode"
        spent = {
            "iterations": 1,
            "compute_s": ran.compute_s,
            "stall_s": ran.stall_s,
            "staging_s": staged.busy_s if staged else 0.0,
        }
        self._add(**{f"{phase}_{name}": amount for name, amount in spent.items()})
        if self._to.governor is None:
            return
        self._to.governor.post(
            IterationObserved(
                iteration=ran.iteration,
                compute_s=ran.compute_s,
                stall_s=ran.stall_s,
                staged_bytes=staged.staged_bytes if staged else 0,
                staging_busy_s=staged.busy_s if staged else 0.0,
                decode_rows=launched.decode_rows,
                prefill_tokens=launched.prefill_tokens,
                resident_blocks=launched.resident_blocks,
                streamed_blocks=launched.streamed_blocks,
                wanted_blocks=launched.wanted_blocks,
            )
        )

    def _tell(
        self,
        advances: Iterable[Advance],
        iteration: IterationId,
        prompt_logprobs: tuple[PromptLogprobs, ...] = (),
    ) -> None:
        advances = tuple(advances)
        if advances or prompt_logprobs:
            self._news.append(
                SequencesAdvanced(
                    iteration=iteration, advances=advances, prompt_logprobs=prompt_logprobs
                )
            )

    def _send_news(self) -> None:
        for news in self._news:
            self._to.delivery.post(news)
        self._news.clear()

    # --- counting ---------------------------------------------------------------------------

    def _add(self, **amounts: float) -> None:
        totals = self._totals
        sums = {name: getattr(totals, name) + amount for name, amount in amounts.items()}
        self._totals = msgspec.structs.replace(totals, **sums)

    def stats(self) -> EngineStats:
        """A snapshot; the engine adds what it alone knows."""
        schedule, residency = self._schedule, self._schedule.residency
        device = residency.device.size
        return msgspec.structs.replace(
            self._totals,
            running=len(schedule.running),
            waiting=schedule.num_waiting,
            parked=len(schedule.parked) + len(schedule.resuming),
            paused=len(schedule.paused),
            block_tokens=schedule.block_tokens,
            device_blocks=device,
            host_blocks=residency.host.size,
            resident_blocks=residency.used_device,
            cached_blocks=len(residency.cache),
            cache_evictions=residency.cache.evictions,
            streamed_blocks=residency.num_streamed,
            parked_blocks=schedule.num_parked_blocks,
            pooled_blocks=residency.host.num_used,
            streamed_limit_blocks=schedule.streamed_limit,
            pending_s=self._pending_s(),
            expansion_ratio=(device + residency.num_streamed) / device,
            **asdict(schedule.counts),
        )

    @property
    def issued_ahead_s(self) -> float:
        """How long before its end an iteration is issued, about."""
        return (self._depth + 1) * self._took_s

    def view(self, layout: KvLayout, stats: EngineStats, spans: Iterable[Span]) -> EngineView:
        """What somebody who looks sees; costs about a millisecond."""
        schedule = self._schedule
        return EngineView(
            now_s=self._now_s(),
            stats=stats,
            memory=memory_map(schedule, layout, progress=self._progress()),
            sequences=tuple(sequence_views(schedule)),
            limits=tuple(self._limits),
            spans=tuple(spans),
        )

    def _progress(self) -> float | None:
        in_flight = self._schedule.in_flight
        if not in_flight or not in_flight[0].is_staged or not self._took_s:
            return None
        return min(1.0, self._pending_s() / self._took_s)

    def _pending_s(self) -> float:
        if not self._schedule.in_flight:
            return 0.0
        return self._now_s() - self._progress_s
