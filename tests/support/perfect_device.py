"""A device for the scheduler alone: no event loop, no tensors, it finishes what it is told to.

It remembers which block lies in which slot, so it notices what an engine on a real device
would only show as wrong text: a block read from a slot that was given to another, a copy
whose source was overwritten under way, a stale block table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from pie_async.core import invariants
from pie_async.core.batching import IterationPlan, plan_iteration
from pie_async.core.residency import ResidencyMap
from pie_async.core.schedule import Launched, Schedule
from pie_async.ids import HostSlot, IterationId, RequestId, SequenceId
from pie_async.messages import Advance, BlockMove, SampledToken, Submit
from pie_async.sampling_params import SamplingParams

BLOCK_TOKENS = 4
FIRST_STAGING_SLOT = 1000
NONSENSE = -1


def a_schedule(
    *,
    device_slots: int = 16,
    host_slots: int = 16,
    staging_slots: int | None = None,
    streamed_limit: int = 0,
    token_budget: int = 64,
    max_running: int = 8,
    eos_ids: Iterable[int] = (),
    shares_prefixes: bool = True,
) -> Schedule:
    """An empty schedule over small memories; blocks of four tokens."""
    return Schedule(
        residency=ResidencyMap(
            device_slots=device_slots,
            host_slots=host_slots,
            staging_slots=host_slots if staging_slots is None else staging_slots,
            first_staging_slot=FIRST_STAGING_SLOT,
        ),
        block_tokens=BLOCK_TOKENS,
        token_budget=token_budget,
        max_running=max_running,
        eos_ids=frozenset(eos_ids),
        shares_prefixes=shares_prefixes,
        streamed_limit=streamed_limit,
    )


def token_at(seed: int, position: int) -> int:
    """The token a sequence of this seed gets at this position, whatever happens to it."""
    return 100 + (seed * 31 + position * 7) % 900


class PerfectDevice:
    """Carries out a schedule's plans, each part when the test says so.

    Attributes:
        outputs: by sequence, the tokens it got.
        ended: by sequence, why it ended.
    """

    def __init__(self, schedule: Schedule, *, iterations_in_flight: int = 2) -> None:
        self.schedule = schedule
        self.outputs: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.advances: list[Advance] = []
        self.plans: list[IterationPlan] = []
        self.launched: list[Launched] = []
        self._depth = iterations_in_flight
        self._next_iteration = 1
        self._next_sequence = 1
        self._flying: deque[IterationPlan] = deque()
        self.swap_outs: deque[list[BlockMove]] = deque()
        self.swap_ins: deque[list[BlockMove]] = deque()
        self._tables: dict[int, list[int]] = {}
        self._lane_of: dict[int, int] = {}
        self._device: dict[int, int] = {}
        self._host: dict[int, int] = {}
        self._seeds: dict[int, int] = {}
        self._reads: dict[int, list[tuple[int, int]]] = {}
        self._slots: dict[int, dict[int, tuple[int, ...]]] = {}
        self._damaged: set[int] = set()
        """Sequences that read what was lost, and have not begun anew."""

    # --- requests ---------------------------------------------------------------------------

    def submit(
        self,
        prompt: Iterable[int] | int,
        max_tokens: int = 4,
        *,
        n: int = 1,
        priority: int = 0,
        cache_salt: str | None = None,
        output_tokens: tuple[int, ...] = (),
        **sampling,
    ) -> list[int]:
        """Submit a prompt (or one of that many distinct tokens); its sequences' ids."""
        first = self._next_sequence
        self._next_sequence += n
        tokens = range(first * 1000, first * 1000 + prompt) if isinstance(prompt, int) else prompt
        ids = list(range(first, first + n))
        params = SamplingParams(max_tokens=max_tokens, n=n, **sampling)
        for index, sequence in enumerate(ids):
            self.outputs[sequence] = []
            self._seeds[sequence] = first + index
        self.schedule.submit(
            Submit(
                request=RequestId(first),
                sequences=tuple(SequenceId(s) for s in ids),
                prompt_tokens=tuple(tokens),
                output_tokens=output_tokens,
                sampling=params,
                seed=first,
                max_tokens=max_tokens,
                priority=priority,
                cache_salt=cache_salt,
            )
        )
        return ids

    def cancel(self, *sequences: int) -> None:
        self._take(self.schedule.cancel(map(SequenceId, sequences), "abort"))

    # --- driving ------------------------------------------------------------------------------

    def plan(self) -> IterationPlan:
        """One planning round, as the scheduler actor does it."""
        plan = plan_iteration(self.schedule, IterationId(self._next_iteration))
        invariants.check(self.schedule)
        self.plans.append(plan)
        if plan.swap_out:
            self.swap_outs.append(plan.swap_out)
        if plan.swap_in:
            self.swap_ins.append(plan.swap_in)
        if plan.rows:
            self._next_iteration += 1
            self._launch(plan)
        return plan

    def plan_ahead(self) -> None:
        """Plan until enough is in flight or nothing more can be launched."""
        while len(self._flying) < self._depth and not self.schedule.is_resting:
            if not self.plan().rows:
                return

    @property
    def num_flying(self) -> int:
        return len(self._flying)

    def settle(self, tokens: dict[int, int] | None = None, *, unstaged: int = 0) -> None:
        """The oldest iteration is over.

        Args:
            tokens: replace what sequences would have sampled.
            unstaged: of so many blocks the staging went wrong: their readers sampled nonsense.
        """
        plan = self._flying.popleft()
        self._check_reads(plan)
        lost = self._staged(plan)[:unstaged]
        self._damaged |= self._readers(plan, {slot for slot, _ in lost})
        sampled = []
        for row in plan.rows:
            if row.is_sampled:
                position = row.start + row.num_tokens
                token = (tokens or {}).get(row.sequence)
                if row.sequence in self._damaged:
                    token = NONSENSE
                if token is None:
                    token = token_at(self._seeds[row.sequence], position)
                sampled.append(SampledToken(row.sequence, token))
        host_slots = [HostSlot(slot) for _, slot in lost]
        launched, advances = self.schedule.settle(plan.iteration, sampled, host_slots)
        self.launched.append(launched)
        self._take(advances)

    def finish_swap_out(self, *, failed: int = 0) -> None:
        """The oldest copies to the pool are complete, but for the first `failed` of them."""
        moves = self.swap_outs.popleft()
        for move in moves[failed:]:
            held = self._device.get(move.device_slot)
            assert held == move.block, f"{move} copied while its source held block {held}"
            self._host[move.host_slot] = move.block
        blocks = [move.block for move in moves]
        self.schedule.swapped_out(blocks[failed:], blocks[:failed])
        invariants.check(self.schedule)

    def finish_swap_in(self, *, failed: int = 0) -> None:
        """The oldest copies from the pool are complete, but for the first `failed` of them."""
        moves = self.swap_ins.popleft()
        for move in moves[failed:]:
            held = self._host.get(move.host_slot)
            assert held == move.block, f"{move} copied while its source held block {held}"
            self._device[move.device_slot] = move.block
        blocks = [move.block for move in moves]
        self._take(self.schedule.swapped_in(blocks[failed:], blocks[:failed]))
        invariants.check(self.schedule)

    def step(self) -> None:
        """Plan, then let the oldest of everything under way end."""
        self.plan_ahead()
        if self.swap_outs:
            self.finish_swap_out()
        if self.swap_ins:
            self.finish_swap_in()
        if self._flying:
            self.settle()
        invariants.check(self.schedule)

    def run(self, most_steps: int = 5000) -> None:
        """Step until everything submitted has ended and every copy is over."""
        for _ in range(most_steps):
            if self.is_quiet:
                return
            self.step()
        raise AssertionError(f"after {most_steps} steps still unfinished: {self.describe()}")

    @property
    def is_quiet(self) -> bool:
        return self.schedule.is_idle and not (self._flying or self.swap_outs or self.swap_ins)

    def describe(self) -> str:
        """The schedule in a line, for a failed test."""
        schedule, residency = self.schedule, self.schedule.residency
        queues = {
            name: [seq.id for seq in getattr(schedule, name)]
            for name in ("running", "resuming", "parked")
        }
        return (
            f"{queues}, {schedule.num_waiting} waiting, {residency.free_device} device slots "
            f"free, {residency.coming_device} coming, {residency.host.num_free} host slots free, "
            f"{residency.num_streamed} streamed of {schedule.streamed_limit} allowed, "
            f"{len(self._flying)} iterations in flight"
        )

    # --- what a device does -------------------------------------------------------------------

    def _take(self, advances: Iterable[Advance]) -> None:
        for advance in advances:
            self.advances.append(advance)
            assert advance.sequence not in self.ended, f"{advance} after its end"
            if advance.token is not None:
                self.outputs[advance.sequence].append(advance.token.token)
            if advance.finish_reason is not None:
                self.ended[advance.sequence] = advance.finish_reason

    def _launch(self, plan: IterationPlan) -> None:
        self._flying.append(plan)
        for binding in plan.bindings:
            self._damaged.discard(binding.sequence)
            self._lane_of[binding.lane] = binding.sequence
            self._tables[binding.lane] = []
        for update in plan.tables:
            table = self._tables[update.lane]
            assert update.first <= len(table), f"{update} leaves a gap in the lane's table"
            table[update.first :] = update.slots
        for row in plan.rows:
            assert self._lane_of[row.lane] == row.sequence, f"{row} in a lane of another"
            seq = self.schedule.sequences[row.sequence]
            table = self._tables[row.lane]
            last = row.start + row.num_tokens - 1
            for index in range(row.start // BLOCK_TOKENS, last // BLOCK_TOKENS + 1):
                assert table[index] < FIRST_STAGING_SLOT, f"{row} writes into a staging slot"
                self._device[table[index]] = seq.table[index].id
        self._reads[plan.iteration] = self._expected_reads(plan)
        self._slots[plan.iteration] = {
            row.sequence: tuple(self._tables[row.lane]) for row in plan.rows
        }
        self._check_reads(plan)

    def _staged(self, plan: IterationPlan) -> list[tuple[int, int]]:
        """(staging slot, host slot) of all that the iteration stages."""
        return [
            (run.device_slot + i, run.host_slot + i) for run in plan.runs for i in range(run.count)
        ]

    def _readers(self, plan: IterationPlan, slots: set[int]) -> set[int]:
        """Sequences that read one of these slots in an iteration."""
        tables = self._slots[plan.iteration]
        return {
            row.sequence
            for row in plan.rows
            if slots.intersection(tables[row.sequence][: -(-row.start // BLOCK_TOKENS)])
        }

    def _expected_reads(self, plan: IterationPlan) -> list[tuple[int, int]]:
        """(slot, block) pairs that the iteration reads, by the device's own block tables."""
        reads = []
        for row in plan.rows:
            seq = self.schedule.sequences[row.sequence]
            num_blocks = -(-(row.start + row.num_tokens) // BLOCK_TOKENS)
            slots = self._tables[row.lane][:num_blocks]
            assert len(slots) == num_blocks, f"{row} reads past its block table {slots}"
            reads += [(s, b.id) for s, b in zip(slots, seq.table, strict=False)]
        return reads

    def _check_reads(self, plan: IterationPlan) -> None:
        """When an iteration starts and when it ends, all it reads must be where it expects."""
        staged = dict(self._staged(plan))
        for slot, block in self._reads[plan.iteration]:
            if slot < FIRST_STAGING_SLOT:
                held = self._device.get(slot)
            else:
                assert slot in staged, f"staging slot {slot} of block {block} is not staged"
                held = self._host.get(staged[slot])
            assert held == block, f"slot {slot} should hold block {block} but holds {held}"


def assert_all_returned(schedule: Schedule) -> None:
    """Nothing is owned, in limbo, in a lane or counted as waiting; cached blocks may stay."""
    residency = schedule.residency
    num_cached = len(residency.cache)
    assert residency.free_device == residency.device.size
    assert residency.device.num_used == num_cached
    for pool in (residency.host, residency.staging, schedule.lanes):
        assert pool.num_used == 0, f"{pool.num_used} {pool.name} slots did not return"
    assert len(residency.blocks) == len(residency.cache.index) == num_cached
    assert schedule.sharing.is_on or not num_cached
    assert not residency.streamed
    assert not residency.clean_resident
    assert (schedule.num_waiting, schedule.waiting_blocks) == (0, 0)
    assert not schedule.has_moves
