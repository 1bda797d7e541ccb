"""Continuous batching: what the next iteration computes, reads, stages and moves.

Decoding sequences come first (one token each), then prompts under way, then new ones, in
chunks, under one token budget. First come, first served within a priority.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pie_async.core import pressure
from pie_async.core.residency import Block
from pie_async.core.schedule import Launched, Schedule
from pie_async.core.sequence import Sequence
from pie_async.core.staged import Staged
from pie_async.ids import DeviceSlot, IterationId
from pie_async.messages import BlockMove, CopyRun, LaneBinding, Row, TableUpdate

PROMOTIONS_BESIDE_STAGING = 8
"""By iteration. A sequence that comes back may bring hundreds of blocks: at once they would hold
up the staged ones behind them for milliseconds."""


@dataclass(slots=True)
class IterationPlan:
    """Everything one planning round decided. `rows` may be empty: then only moves."""

    iteration: IterationId
    rows: list[Row] = field(default_factory=list)
    bindings: list[LaneBinding] = field(default_factory=list)
    tables: list[TableUpdate] = field(default_factory=list)
    runs: list[CopyRun] = field(default_factory=list)
    swap_out: list[BlockMove] = field(default_factory=list)
    swap_in: list[BlockMove] = field(default_factory=list)


def plan_iteration(schedule: Schedule, iteration: IterationId) -> IterationPlan:
    """Decide the next iteration and record it as launched.

    Changes `schedule`; the caller must carry the plan out. An empty plan means that there is
    something to wait for: an iteration or a copy under way.
    """
    while True:
        before = _position(schedule)
        plan = _plan_once(schedule, iteration)
        moves = plan.swap_out or plan.swap_in or schedule.has_moves
        if plan.rows or moves or schedule.in_flight or schedule.is_resting or schedule.awaits_pool:
            return plan
        if schedule.guidance.is_wanted(schedule.running):
            return plan  # masks are on their way
        if schedule.residency.pool_size.is_changing or schedule.residency.pool_size.is_short:
            return plan  # more of the pool is on its way
        # Nothing is under way that could report back: making room must have made some.
        assert _position(schedule) != before, f"the schedule is stuck: {before}"


def _position(schedule: Schedule) -> tuple[int, ...]:
    return (
        len(schedule.running),
        len(schedule.resuming),
        len(schedule.parked),
        len(schedule.paused),
        schedule.num_waiting,
        schedule.residency.free_device,
        schedule.residency.available_host,
        schedule.residency.num_streamed,
        schedule.num_starved,
    )


def _plan_once(schedule: Schedule, iteration: IterationId) -> IterationPlan:
    plan = IterationPlan(iteration)
    pressure.preempt(schedule)
    batch = _Batch(schedule, plan)
    batch.decode()
    batch.prefill()
    batch.admit()
    schedule.starved_plans = schedule.starved_plans + 1 if schedule.num_starved else 0
    plan.swap_out, promotions = pressure.relieve(schedule, batch.next_chunk_blocks)
    schedule.promotions.extend(promotions)
    plan.swap_in = _next_promotions(schedule, is_running=bool(plan.rows))
    if not plan.rows:
        return plan
    batch.describe_lanes()
    staged = schedule.residency.staged.now()
    plan.runs = staged.runs()
    batch.launch(staged)
    return plan


def _next_promotions(schedule: Schedule, *, is_running: bool) -> list[BlockMove]:
    """What may come home beside this iteration; staging, which compute waits for, goes first."""
    waiting = schedule.promotions
    count = len(waiting)
    if is_running and schedule.residency.num_streamed:
        count = min(count, PROMOTIONS_BESIDE_STAGING)
    return [waiting.popleft() for _ in range(count)]


class _Batch:
    """One iteration in the making."""

    def __init__(self, schedule: Schedule, plan: IterationPlan) -> None:
        self._schedule = schedule
        self._plan = plan
        self._budget = schedule.token_budget
        self._sequences: list[Sequence] = []
        self._prompts: list[Sequence] = []
        """Running sequences whose prompts are not computed yet."""
        self._decode_rows = 0
        schedule.num_starved = 0
        self._promised_blocks = 0
        self.next_chunk_blocks = 0
        """Blocks that prompts under way want in the iteration after this one."""

    def decode(self) -> None:
        holds_guided = self._holds_guided()
        for seq in self._schedule.running:
            expected_len = len(seq.tokens) + seq.samples_in_flight
            if expected_len - seq.num_launched > 1:
                self._prompts.append(seq)
            elif seq.is_guided and (holds_guided or not self._may_guide(seq)):
                continue
            elif expected_len < seq.prompt_len + seq.max_tokens and self._budget:
                if self._has_room(seq, 1):
                    self._add(seq, 1)
                    self._decode_rows += 1
                else:
                    self._schedule.num_starved += 1

    def _may_guide(self, seq: Sequence) -> bool:
        """Whether a guided sequence may sample: its mask is ready, or soon will be."""
        guidance = self._schedule.guidance
        return guidance.may_sample(seq) or guidance.may_be_late(seq)

    def _holds_guided(self) -> bool:
        """Whether guided sequences wait for the iteration in flight. If nothing else is to be
        computed, two iterations of half of them each would take twice as long as one of all."""
        schedule = self._schedule
        if not (schedule.in_flight and schedule.guidance.ready):
            return False
        if not all(seq.is_guided and seq.num_unfed <= 1 for seq in schedule.running):
            return False
        return not all(map(self._may_guide, schedule.running))

    def prefill(self) -> None:
        for seq in self._prompts:
            self._add_chunk(seq)

    def admit(self) -> None:
        """Start waiting sequences while lanes, budget and memory allow."""
        schedule = self._schedule
        while self._budget and schedule.free_lanes:
            seq = schedule.next_waiting()
            if seq is None or self._is_behind_parked(seq) or not self._may_admit(seq):
                return
            schedule.start(seq)
            schedule.adopt_prefix(seq)
            self._add_chunk(seq)

    def _is_behind_parked(self, seq: Sequence) -> bool:
        parked = self._schedule.parked
        return bool(parked) and parked[0].order < seq.order

    def _may_admit(self, seq: Sequence) -> bool:
        """Whether its tokens fit beside what runs, with room to grow for that, and it is not
        better off a moment later."""
        residency = self._schedule.residency
        if residency.free_device == 0 or residency.num_streamed > self._schedule.streamed_limit:
            return False
        if self._schedule.growth_reserve == 0:
            return True
        if self._schedule.sharing.awaits_prefix(seq, self._schedule.running):
            return False
        promised = self._promised_blocks
        return pressure.blocks_to_admit(self._schedule, seq, promised=promised) is not None

    def _add_chunk(self, seq: Sequence) -> None:
        """As much of a prompt as budget and free slots allow."""
        size = self._schedule.block_tokens
        free = self._schedule.residency.free_device
        slots = (len(seq.table) + free) * size - seq.num_launched
        num_tokens = min(seq.num_unfed, self._budget, slots)
        if num_tokens == seq.num_unfed and not self._schedule.guidance.may_sample(seq):
            num_tokens -= 1  # the last one is fed when it is known what may follow
            if num_tokens == 0:
                return
        if num_tokens > 0 and self._has_room(seq, num_tokens):
            self._add(seq, num_tokens)
        elif self._budget:
            self._schedule.num_starved += 1
        rest = self._schedule.blocks_for(len(seq.tokens)) - len(seq.table)
        self._promised_blocks += rest
        self.next_chunk_blocks += min(rest, self._schedule.token_budget // size + 1)

    def _has_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for its next tokens; False, and nothing, if there are none."""
        missing = self._schedule.blocks_for(seq.num_launched + num_tokens) - len(seq.table)
        if missing <= 0:
            return True
        residency = self._schedule.residency
        if missing > residency.free_device:
            return False
        before = seq.table[-1].owners if seq.table else ()
        owners = before if len(before) == 1 else (seq,)
        for _ in range(missing):
            index = len(seq.table)
            block = residency.allocate(index, owners)
            assert block is not None
            seq.table.append(block)
            if seq.dirty_from is None:
                seq.dirty_from = index
        return True

    def _add(self, seq: Sequence, num_tokens: int) -> None:
        assert seq.lane is not None
        start = seq.num_launched
        # A token sampled by an iteration in flight never leaves the device: no ids to send.
        is_fed_back = seq.samples_in_flight > 0
        tokens = () if is_fed_back else tuple(seq.tokens[start : start + num_tokens])
        is_sampled = start + num_tokens == len(seq.tokens) + seq.samples_in_flight
        mask = self._schedule.guidance.take(seq) if is_sampled else None
        self._plan.rows.append(Row(seq.id, seq.lane, start, tokens, is_sampled, mask))
        self._sequences.append(seq)
        self._budget -= num_tokens
        if start < seq.prompt_len:
            self._schedule.counts.prompt_tokens += min(num_tokens, seq.prompt_len - start)
        seq.num_launched += num_tokens
        seq.samples_in_flight += is_sampled
        seq.launches_in_flight += 1

    def describe_lanes(self) -> None:
        """Tell the device what changed in the lanes that run: bindings and block tables."""
        for seq in self._sequences:
            assert seq.lane is not None
            if not seq.is_bound:
                self._plan.bindings.append(self._binding(seq))
                seq.is_bound = True
                seq.dirty_from = 0
            if seq.dirty_from is not None:
                # A list first: a tuple of unknown length is resized, and then fills up another of
                # Python's free lists than it came from.
                slots = tuple([_read_slot(block) for block in seq.table[seq.dirty_from :]])
                self._plan.tables.append(TableUpdate(seq.lane, seq.dirty_from, slots))
                seq.dirty_from = None

    def _binding(self, seq: Sequence) -> LaneBinding:
        assert seq.lane is not None
        sampling = seq.sampling
        eos = () if sampling.ignore_eos else tuple(sorted(self._schedule.eos_ids))
        return LaneBinding(
            lane=seq.lane,
            sequence=seq.id,
            sampling=sampling,
            seed=seq.seed,
            stop_ids=eos + sampling.stop_token_ids,
            prompt_len=seq.prompt_len,
            history=tuple(seq.tokens) if sampling.counts_tokens else (),
        )

    def launch(self, staged: Staged) -> None:
        plan, schedule = self._plan, self._schedule
        schedule.residency.launched(plan.iteration)
        num_tokens = schedule.token_budget - self._budget
        schedule.in_flight.append(
            Launched(
                iteration=plan.iteration,
                rows=tuple(plan.rows),
                decode_rows=self._decode_rows,
                prefill_tokens=num_tokens - self._decode_rows,
                resident_blocks=schedule.residency.used_device,
                streamed_blocks=schedule.residency.num_streamed,
                wanted_blocks=pressure.wanted_streamed(schedule),
                is_staged=bool(plan.runs),
                staged=staged,
            )
        )


def _read_slot(block: Block) -> DeviceSlot:
    slot = block.read_slot
    assert slot is not None, f"block {block.id} is read by an iteration but lies in no slot"
    return slot
