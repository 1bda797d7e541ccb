"""The scheduler's state, and what messages do to it.

Facts and commands come in through the methods below; what to do next comes out of
`batching.plan_iteration`. Nothing here waits or touches a device.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from pie_async.core.guidance import Guidance
from pie_async.core.headroom import LINK_SHARE
from pie_async.core.prefix_hash import PrefixHasher
from pie_async.core.residency import Block, ResidencyMap
from pie_async.core.sequence import Sequence, State
from pie_async.core.slots import SlotPool
from pie_async.core.staged import Staged
from pie_async.ids import BlockId, HostSlot, IterationId, Lane, SequenceId
from pie_async.messages import (
    Advance,
    BlockMove,
    FirstToken,
    MaskMade,
    MaskOrder,
    PoolGrown,
    Row,
    SampledToken,
    Submit,
)
from pie_async.outputs import FinishReason

_by_order = attrgetter("order")

_CAN_PAUSE = frozenset({State.WAITING, State.RUNNING, State.PARKED})
"""The states that a sequence can be paused in at once."""

LEAST_GROWTH_BLOCKS, MOST_GROWTH_BLOCKS = 1.0, 4.0
GROWTH_PER_PARKING, GROWTH_PER_END = 0.5, 0.0125
"""How much room to grow admission leaves: more after a parking, less with every sequence that
ends, so that one in forty is parked. Nobody knows how long outputs will be; with always one block a
quarter of long ones was parked under overload, with always two a third fewer short ones ran. At one
in twenty TPOT p99 under overload was a fifth longer, throughput at most 2 % higher. Two blocks at
most bring 0.5 to 3 % in a large batch; where few long sequences fill the memory they double the
longest gap between two tokens (`test_fairness.py`)."""

SHRINK_TOLERANCE = 1 / LINK_SHARE
"""How far what runs may go beyond a limit that was lowered, unless it is exact: fixed by the
caller, or there for an ITL limit. Sequences that run go on to it as they grow, none is admitted
there, and beyond it one is parked. It is the part of the link's time that the governor leaves free.
When growth was held to the limit as well, a cut of 10 % left every sequence without its next block
within 16 iterations: of 198 that decoded 73 were left. At 1.1 a host pool stalled for 13 % of 70
iterations in a row, for no cut reached what was beyond the limit."""

WORTH_AWAITING_TOKENS = 512
"""Waiting costs an iteration or two, in which a GPU computes about so many tokens of a prompt.
Measured in simulation, 64 prompts of 1,024 equal tokens at once, 8,192 tokens per iteration: median
TTFT 45 ms instead of 313."""


MOST_LOSSES = 3
"""A sequence whose KV was lost in copies is computed again; after so many times it ends instead."""


@dataclass(slots=True)
class Launched:
    """An iteration that was issued and has not settled."""

    iteration: IterationId
    rows: tuple[Row, ...]
    decode_rows: int
    prefill_tokens: int
    resident_blocks: int
    streamed_blocks: int
    wanted_blocks: int
    is_staged: bool
    staged: Staged


@dataclass(slots=True)
class Counts:
    """Totals since the start; each is a field of `EngineStats` of the same name."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    output_tokens: int = 0
    sequences_finished: int = 0
    sequences_cancelled: int = 0
    preemptions_parked: int = 0
    preemptions_recomputed: int = 0
    pauses: int = 0
    demotions: int = 0
    promotions: int = 0
    copies_lost: int = 0
    sequences_begun_anew: int = 0
    sequences_lost: int = 0


@dataclass(slots=True)
class Schedule:
    """All sequences of one engine, in their queues."""

    residency: ResidencyMap
    block_tokens: int
    token_budget: int
    max_running: int
    eos_ids: frozenset[int]
    shares_prefixes: bool = True
    """Whether a sequence may take over blocks that another one has computed."""
    prefix_seed: bytes = b""
    """Makes the blocks' digests this process's own."""
    now_s: float = 0.0
    """When the message came that is being handled: core reads no clock."""
    streamed_limit: int = 0
    """Blocks that may be streamed, as the governor says."""
    shrink_tolerance: float = SHRINK_TOLERANCE
    """Sequences that run may stream more than a lowered limit by this factor."""
    least_streamed: int = 0
    """Blocks that are streamed even where everything fits: for measurements."""

    worth_awaiting_tokens: int = WORTH_AWAITING_TOKENS
    """A sequence waits for another one to compute so much of its prompt."""

    awaits_pool: bool = False
    """More of the host pool is being pinned: what finds no room yet has something to wait for."""

    sequences: dict[SequenceId, Sequence] = field(default_factory=dict)
    running: list[Sequence] = field(default_factory=list)
    """In serving order."""
    resuming: list[Sequence] = field(default_factory=list)
    parked: list[Sequence] = field(default_factory=list)
    """In serving order."""
    paused: list[Sequence] = field(default_factory=list)
    """Longest paused first."""
    pauses_unread: bool = True
    """Not while draining: then everything is to be finished, read or not."""
    in_flight: deque[Launched] = field(default_factory=deque)
    growth_blocks: float = LEAST_GROWTH_BLOCKS
    """For each running sequence so many blocks are kept free of new ones, on the average."""
    promotions: deque[BlockMove] = field(default_factory=deque)
    """Swap-ins that were decided and wait for their turn on the link."""
    counts: Counts = field(default_factory=Counts)
    lanes: SlotPool = field(init=False)
    hasher: PrefixHasher = field(init=False)
    guidance: Guidance = field(init=False)
    num_starved: int = 0
    """Running sequences that found no device slot for their next tokens."""
    starved_plans: int = 0
    """For how many plans in a row there were any."""
    waiting_blocks: int = 0
    """Blocks that the waiting sequences' tokens need."""
    damaged: set[SequenceId] = field(default_factory=set)
    """Parked sequences that start over once their last iterations, worthless ones, are over."""
    num_waiting: int = 0
    _waiting: list[tuple[tuple[int, int], Sequence]] = field(default_factory=list)
    _followers: dict[SequenceId, list[Sequence]] = field(default_factory=dict)
    _arrivals: int = 0

    def __post_init__(self) -> None:
        self.lanes = SlotPool("lane", self.max_running)
        self.hasher = PrefixHasher(self.prefix_seed, self.block_tokens)
        self.guidance = Guidance(self.max_running)

    # --- commands ---------------------------------------------------------------------------

    def submit(self, command: Submit) -> None:
        """Queue a request's sequences. All but the first follow it: they start when its
        prompt is computed, and share its blocks."""
        leader: Sequence | None = None
        prefix_root = self.hasher.root(command.cache_salt)
        for index, sequence_id in enumerate(command.sequences):
            seq = Sequence(
                id=sequence_id,
                request=command.request,
                prompt_len=len(command.prompt_tokens),
                tokens=[*command.prompt_tokens, *command.output_tokens],
                sampling=command.sampling,
                seed=command.seed + index,
                max_tokens=command.max_tokens,
                order=(command.priority, self._arrivals),
                is_guided=command.sampling.structured_outputs is not None,
                arrived_s=self.now_s,
                prefix_root=prefix_root,
            )
            self._arrivals += 1
            self.sequences[seq.id] = seq
            self.guidance.num_guided += seq.is_guided
            if leader is None or not self.may_share(seq):
                self._enqueue(seq)
                leader = leader or seq
            else:
                self.num_waiting += 1
                seq.is_follower = True
                self._followers.setdefault(leader.id, []).append(seq)

    def cancel(self, sequences: Iterable[SequenceId], reason: FinishReason) -> list[Advance]:
        """End these sequences now; unknown and finished ones are passed over."""
        advances = []
        for sequence_id in sequences:
            seq = self.sequences.get(sequence_id)
            if seq is not None:
                self.finish(seq, reason)
                advances.append(Advance(sequence_id, None, reason))
        return advances

    def drain(self) -> None:
        """From now on sequences go on whether somebody reads them or not."""
        self.pauses_unread = False
        self.reading_changed(list(self.sequences), is_read=True)

    # --- facts ------------------------------------------------------------------------------

    def reading_changed(self, sequences: Iterable[SequenceId], *, is_read: bool) -> None:
        """Nobody reads these sequences, or somebody does again; unknown ones are passed over.

        One that comes back, or waits for its request's prompt, is paused once it could run.
        """
        for sequence_id in sequences:
            seq = self.sequences.get(sequence_id)
            if seq is None or not (is_read or self.pauses_unread):
                continue
            seq.is_read = is_read
            if is_read and seq.state is State.PAUSED:
                self._unpause(seq)
            elif not is_read and self._can_pause(seq):
                self.pause(seq)

    def pool_grown(self, grown: PoolGrown) -> list[Advance]:
        """The host pool has more slots. If the memories will not hold what they were meant to,
        sequences end where they are full, those at once whose prompt alone is too long."""
        told = self.residency.pool_size.told
        self.awaits_pool = told(grown.slots, is_all=grown.is_all)
        if grown.longest is None:
            return []
        too_long, full = [], []
        for seq in self.sequences.values():
            seq.max_tokens = min(seq.max_tokens, grown.longest - seq.prompt_len)
            if seq.max_tokens < 1:
                too_long.append(seq.id)
            elif seq.num_outputs >= seq.max_tokens:
                full.append(seq.id)
        return self.cancel(too_long, "abort") + self.cancel(full, "length")

    def settle(
        self,
        iteration: IterationId,
        sampled: Iterable[SampledToken],
        unstaged: Iterable[HostSlot] = (),
    ) -> tuple[Launched, list[Advance]]:
        """An iteration is over: its KV is written and these are its tokens.

        Args:
            unstaged: host slots whose blocks it found wrong.
        """
        launched = self.in_flight.popleft()
        assert launched.iteration == iteration, f"iteration {iteration} settled out of order"
        self.residency.settled(iteration)
        self.guidance.settled(launched.rows)
        size, sequences = self.block_tokens, self.sequences
        rows, advances = launched.rows, list[Advance]()
        if unstaged:
            advances = self._damage(launched, frozenset(unstaged))
        if self.damaged:
            rows, sampled = self._without_damaged(rows, sampled)
        for row in rows:
            seq = sequences.get(row.sequence)
            if seq is not None:
                seq.launches_in_flight -= 1
                seq.num_settled = row.start + (len(row.tokens) or 1)
                if seq.num_settled >= (seq.num_sealed + 1) * size:
                    self._seal(seq)
        for token in sampled:
            seq = sequences.get(token.sequence)
            if seq is not None:
                advances.append(self._advance(seq, token))
                self.counts.output_tokens += 1
        return launched, advances

    def mask_orders(self) -> tuple[MaskOrder, ...]:
        """Masks that running sequences need for their next tokens and that nobody has ordered."""
        late = self.guidance.late_orders(self.sequences, self.damaged)
        return late + self.guidance.orders(self.running)

    def masks_made(self, masks: Iterable[MaskMade]) -> list[Advance]:
        """Orders were carried out. Sequences whose output is complete end, and so do those whose
        guide has failed."""
        advances: list[Advance] = []
        for mask in masks:
            seq = self.sequences.get(mask.sequence)
            is_running = seq is not None and seq.state is State.RUNNING
            self.guidance.made(mask, is_running=is_running)
            if seq is None or not (mask.is_ended or mask.refusal):
                continue
            reason: FinishReason = "abort" if mask.refusal else "stop"
            self.finish(seq, reason)
            advances.append(Advance(seq.id, None, reason, unguided_because=mask.refusal))
        return advances

    def swapped_out(self, blocks: Iterable[BlockId], failed: Iterable[BlockId] = ()) -> None:
        """Copies to the pool are over; those that failed leave their blocks where they are."""
        for block in blocks:
            self.residency.finish_demote(block)
            self.counts.demotions += 1
        for block in failed:
            self.residency.fail_demote(block)
            self.counts.copies_lost += 1

    def swapped_in(
        self, blocks: Iterable[BlockId], failed: Iterable[BlockId] = ()
    ) -> list[Advance]:
        """Copies home are over; a sequence that waits for one that failed is computed again."""
        for block in blocks:
            self.residency.finish_promote(block)
            self.counts.promotions += 1
        advances: list[Advance] = []
        for block in failed:
            waiting = self.residency.blocks[block].owners
            self.residency.fail_promote(block)
            self.counts.copies_lost += 1
            for seq in waiting:
                if seq.state is State.RESUMING and not self._lose(seq, advances):
                    self.resuming.remove(seq)
                    self._begin_anew(seq)
        for seq in [s for s in self.resuming if is_readable(s)]:
            if seq.is_read:
                self.resuming.remove(seq)
                self.start(seq)
            else:
                self.pause(seq)
        return advances

    # --- KV that was lost -----------------------------------------------------------------------

    def _damage(self, launched: Launched, unstaged: frozenset[HostSlot]) -> list[Advance]:
        """Set those aside that read these slots: what they computed since is worthless. Nothing
        of it is sealed, so nobody shares it."""
        advances: list[Advance] = []
        rows = {row.sequence for row in launched.rows}
        for block_id in launched.staged.blocks_from(unstaged):
            block = self.residency.blocks.get(block_id)
            for seq in block.owners if block is not None else ():
                if seq.id in rows and seq.id not in self.damaged and not self._lose(seq, advances):
                    if seq.state is State.RUNNING:
                        self._set_aside(seq)
                    elif seq.state is State.PAUSED:
                        self._unpause(seq)  # `_begin_anew` pauses it again
                    self.damaged.add(seq.id)
        self.counts.copies_lost += len(unstaged)
        return advances

    def _lose(self, seq: Sequence, advances: list[Advance]) -> bool:
        """Count a loss; True if it was one too many, and the sequence is over."""
        seq.num_losses += 1
        if seq.num_losses <= MOST_LOSSES:
            return False
        self.finish(seq, "abort")
        self.counts.sequences_lost += 1
        why = f"its KV was lost {seq.num_losses} times in copies that failed"
        advances.append(Advance(seq.id, None, "abort", lost_because=why))
        return True

    def _without_damaged(
        self, rows: tuple[Row, ...], sampled: Iterable[SampledToken]
    ) -> tuple[tuple[Row, ...], list[SampledToken]]:
        """What an iteration did for the others. A damaged sequence starts over once none of its
        iterations is under way."""
        damaged = frozenset(self.damaged)
        kept = [token for token in sampled if token.sequence not in damaged]
        for row in rows:
            if row.sequence in damaged:
                seq = self.sequences[row.sequence]
                seq.launches_in_flight -= 1
                seq.samples_in_flight -= row.is_sampled
                if seq.launches_in_flight == 0:
                    self.parked.remove(seq)
                    self.damaged.remove(seq.id)
                    self._begin_anew(seq)
        return tuple(row for row in rows if row.sequence not in damaged), kept

    def _begin_anew(self, seq: Sequence) -> None:
        self._forget_kv(seq)
        seq.move_to(State.WAITING)
        self._enqueue(seq)
        if not seq.is_read:
            self.pause(seq)
        self.counts.sequences_begun_anew += 1

    # --- queues -------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        return not self.sequences and not self.promotions

    @property
    def is_resting(self) -> bool:
        """Nothing is to be computed: what there is waits for its readers."""
        queued = self.running or self.resuming or self.parked or self.num_waiting
        return not (queued or self.promotions)

    @property
    def has_moves(self) -> bool:
        """Whether copies that free or fill slots are under way."""
        return self.residency.moving_in > 0 or self.residency.moving_out > 0

    @property
    def growth_reserve(self) -> int:
        """Blocks that running and resuming sequences are to find when they grow."""
        return round(self.growth_blocks * (len(self.running) + len(self.resuming)))

    @property
    def free_lanes(self) -> int:
        """Lanes that nobody runs in and no resuming sequence is going to."""
        return self.lanes.num_free - len(self.resuming)

    @property
    def num_parked_blocks(self) -> int:
        """Blocks of parked and paused sequences that lie in the pool alone."""
        held = (block for seq in (*self.parked, *self.paused) for block in seq.table)
        return sum(block.device_slot is None for block in held)

    def next_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0][1].state is not State.WAITING:
            heapq.heappop(self._waiting)  # cancelled or paused while it waited
        return self._waiting[0][1] if self._waiting else None

    def start(self, seq: Sequence) -> None:
        """Let a waiting or resuming sequence run."""
        if seq.state is State.WAITING:
            heapq.heappop(self._waiting)
            self._leave_queue(seq)
        seq.move_to(State.RUNNING)
        lane = self.lanes.take()
        assert lane is not None
        seq.lane = Lane(lane)
        seq.is_bound = False
        if seq.started_s is None:
            seq.started_s = self.now_s
        if seq.table and not seq.table[-1].is_sealed:
            self.residency.reopen(seq.table[-1])
        insort(self.running, seq, key=_by_order)

    def park(self, seq: Sequence) -> None:
        """Preempt a running sequence and keep its KV."""
        self._set_aside(seq)
        self.counts.preemptions_parked += 1
        self.growth_blocks = min(MOST_GROWTH_BLOCKS, self.growth_blocks + GROWTH_PER_PARKING)

    def _set_aside(self, seq: Sequence) -> None:
        self._leave_lane(seq)
        seq.move_to(State.PARKED)
        insort(self.parked, seq, key=_by_order)
        self._let_blocks_leave(seq)

    def _let_blocks_leave(self, seq: Sequence) -> None:
        seq.demote_from = 0
        self._stop_streaming(seq.table)

    def _stop_streaming(self, blocks: Iterable[Block]) -> None:
        """What of these no running sequence reads."""
        for block in blocks:
            if block.is_streamed and not is_read_by_running(block):
                self.residency.unstage(block)

    def pause(self, seq: Sequence) -> None:
        """Stop a sequence that nobody reads, wherever it is, and keep its KV."""
        if seq.state is State.RUNNING:
            self._leave_lane(seq)
        elif seq.state is State.PARKED:
            self.parked.remove(seq)
        elif seq.state is State.RESUMING:
            self.resuming.remove(seq)
        else:
            self._leave_queue(seq)
        seq.move_to(State.PAUSED)
        self.paused.append(seq)
        self._let_blocks_leave(seq)
        self._free_followers(seq)  # they may be read, and it will not compute the prompt now
        self.counts.pauses += 1

    def _can_pause(self, seq: Sequence) -> bool:
        """At once; others are when they come back, start over, or need not follow any more."""
        is_bound = seq.is_follower or seq.id in self.damaged
        return not is_bound and seq.state in _CAN_PAUSE

    def _unpause(self, seq: Sequence) -> None:
        """Somebody reads it again: it waits for its turn, with or without its KV."""
        self.paused.remove(seq)
        if seq.table:
            seq.move_to(State.PARKED)
            insort(self.parked, seq, key=_by_order)
        else:
            seq.move_to(State.WAITING)
            self._enqueue(seq)

    def resume(self, seq: Sequence) -> None:
        """Its copies are under way; `swapped_in` will start it."""
        seq.move_to(State.RESUMING)
        self.parked.remove(seq)
        self.resuming.append(seq)

    def drop(self, seq: Sequence) -> None:
        """Give up a parked or paused sequence's KV: all its tokens will be computed again.

        Its iterations have settled, so no token is on its way to it.
        """
        assert seq.launches_in_flight == 0
        self._forget_kv(seq)
        if seq.state is State.PARKED:
            self.parked.remove(seq)
            seq.move_to(State.WAITING)
            self._enqueue(seq)
        self.counts.preemptions_recomputed += 1

    def _forget_kv(self, seq: Sequence) -> None:
        """All its tokens are to be computed again."""
        self._release_table(seq)
        seq.num_launched = seq.num_settled = seq.num_sealed = seq.demote_from = 0

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """Take a sequence out of its queue and its memory back."""
        state = seq.state
        if state is State.RUNNING:
            self._leave_lane(seq)
        elif state is State.PARKED:
            self.parked.remove(seq)
        elif state is State.RESUMING:
            self.resuming.remove(seq)
        elif state is State.PAUSED:
            self.paused.remove(seq)
        else:
            self._leave_queue(seq)
        seq.move_to(State.FINISHED)
        self._release_table(seq)
        del self.sequences[seq.id]
        self.guidance.finished(seq)
        self.damaged.discard(seq.id)
        self._free_followers(seq)
        self.counts.sequences_finished += 1
        self.growth_blocks = max(LEAST_GROWTH_BLOCKS, self.growth_blocks - GROWTH_PER_END)
        self.counts.sequences_cancelled += reason == "abort"

    def _enqueue(self, seq: Sequence) -> None:
        heapq.heappush(self._waiting, (seq.order, seq))
        self.num_waiting += 1
        self.waiting_blocks += self.blocks_for(len(seq.tokens))

    def _leave_queue(self, seq: Sequence) -> None:
        self.num_waiting -= 1
        if not seq.is_follower:
            self.waiting_blocks -= self.blocks_for(len(seq.tokens))

    def _leave_lane(self, seq: Sequence) -> None:
        assert seq.lane is not None
        self.running.remove(seq)
        self.lanes.give_back(seq.lane)
        seq.lane = None
        self.guidance.left_lane(seq)

    def _release_table(self, seq: Sequence) -> None:
        for block in reversed(seq.table):  # a cached block without those before it is no use
            self.residency.release(block, seq)
        self._stop_streaming(seq.table)  # to others that own it and do not run
        seq.table.clear()
        seq.dirty_from = None

    # --- sharing ------------------------------------------------------------------------------

    def may_share(self, seq: Sequence) -> bool:
        """Whether it may take over blocks that another sequence has computed."""
        return self.shares_prefixes and seq.sampling.prompt_logprobs is None

    def adopt_prefix(self, seq: Sequence) -> None:
        """Give a sequence that has just started the blocks that hold its leading tokens.

        At least one token is left to compute: what follows the last one is to be sampled.
        """
        if not self.may_share(seq):
            return
        for block in self._found(seq):
            self.residency.adopt(block, seq)
            seq.table.append(block)
        shared = len(seq.table) * self.block_tokens
        seq.num_launched = seq.num_settled = shared
        seq.num_sealed = len(seq.table)
        if seq.num_cached_tokens is None:  # what it finds when it starts over is mostly its own
            seq.num_cached_tokens = shared
            self.counts.prefix_query_tokens += len(seq.tokens)
            self.counts.prefix_hit_tokens += shared
            self.counts.cached_tokens += shared
        self._free_followers_of_prompt(seq)

    def _found(self, seq: Sequence) -> Iterator[Block]:
        """The blocks that hold its leading tokens, but for the last one."""
        for index in range((len(seq.tokens) - 1) // self.block_tokens):
            block = self.residency.cache.find(self._digest(seq, index))
            if block is None:
                return
            yield block

    def _digest(self, seq: Sequence, index: int) -> bytes:
        """Of its block at `index`, whose tokens are all known."""
        while len(seq.digests) <= index:
            parent = seq.digests[-1] if seq.digests else seq.prefix_root
            seq.digests.append(self.hasher.digest(parent, seq.tokens, len(seq.digests)))
        return seq.digests[index]

    def num_shared_blocks(self, seq: Sequence) -> int:
        """Blocks in use that a waiting sequence would share: they take no room of its own."""
        if not self.may_share(seq):
            return 0
        return sum(bool(block.owners) for block in self._found(seq))

    def awaits_prefix(self, seq: Sequence) -> bool:
        """Whether a running sequence is about to compute what a waiting one would compute too,
        enough of it that waiting is faster."""
        if not self.may_share(seq):
            return False
        size = self.block_tokens
        worth = -(-self.worth_awaiting_tokens // size)
        computing = [
            one for one in self.running if one.num_sealed + worth <= one.prompt_len // size
        ]
        if not computing:
            return False
        last = sum(1 for _ in self._found(seq)) + worth - 1
        if last >= (len(seq.tokens) - 1) // size:
            return False
        wanted = self._digest(seq, last)
        return any(
            last < one.prompt_len // size and self._digest(one, last) == wanted for one in computing
        )

    def _free_followers_of_prompt(self, leader: Sequence) -> None:
        """Let them go once all that they can share is computed."""
        size = self.block_tokens
        if leader.num_settled >= (leader.prompt_len - 1) // size * size:
            self._free_followers(leader)

    def _free_followers(self, leader: Sequence) -> None:
        for seq in self._followers.pop(leader.id, ()):
            seq.is_follower = False
            if seq.state is State.WAITING:
                self.num_waiting -= 1
                self._enqueue(seq)
                if not seq.is_read:
                    self.pause(seq)

    # --- settling -----------------------------------------------------------------------------

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_tokens)

    def _seal(self, seq: Sequence) -> None:
        size = self.block_tokens
        for index in range(seq.num_sealed, seq.num_settled // size):
            block = seq.table[index]
            block.is_sealed = True
            if self.shares_prefixes:
                block.digest = self._digest(seq, index)
                self.residency.cache.enter(block)
        seq.num_sealed = seq.num_settled // size
        self._free_followers_of_prompt(seq)

    def _advance(self, seq: Sequence, token: SampledToken) -> Advance:
        seq.tokens.append(token.token)
        seq.samples_in_flight -= 1
        num_outputs = len(seq.tokens) - seq.prompt_len
        first = None
        if num_outputs == 1:
            first = self._first_token(seq)
            self._free_followers(seq)
        reason, stop_token = self._end(seq, token.token, num_outputs)
        if reason is not None:
            self.finish(seq, reason)
        return Advance(seq.id, token, reason, stop_token, first)

    def _first_token(self, seq: Sequence) -> FirstToken:
        assert seq.started_s is not None
        return FirstToken(
            cached_tokens=seq.num_cached_tokens or 0,
            queued_s=seq.started_s - seq.arrived_s,
            prefill_s=self.now_s - seq.started_s,
        )

    def _end(
        self, seq: Sequence, token: int, num_outputs: int
    ) -> tuple[FinishReason | None, int | None]:
        """Why this token is the last one, and the stop token id if it is one of those."""
        sampling = seq.sampling
        if num_outputs >= sampling.min_tokens:
            if token in self.eos_ids and not sampling.ignore_eos:
                return "stop", None
            if token in sampling.stop_token_ids:
                return "stop", token
        if num_outputs >= seq.max_tokens:
            return "length", None
        return None, None


def is_readable(seq: Sequence) -> bool:
    """Whether an iteration could read all of its blocks."""
    return all(block.read_slot is not None for block in seq.table)


def is_read_by_running(block: Block) -> bool:
    return any(seq.state in (State.RUNNING, State.RESUMING) for seq in block.owners)
