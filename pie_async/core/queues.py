"""All sequences of one engine, in their queues, and the ways from one to another."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from pie_async.core.growth import Growth
from pie_async.core.guidance import Guidance
from pie_async.core.residency import Block, ResidencyMap
from pie_async.core.sequence import Sequence, State
from pie_async.core.slots import SlotPool
from pie_async.ids import Lane, SequenceId
from pie_async.outputs import FinishReason

_by_order = attrgetter("order")

_CAN_PAUSE = frozenset({State.WAITING, State.RUNNING, State.PARKED})
"""The states that a sequence can be paused in at once."""


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


@dataclass(slots=True, kw_only=True)
class Queues:
    """Where each sequence is. What is counted and kept beside it follows every move."""

    residency: ResidencyMap
    block_tokens: int
    max_running: int
    now_s: float = 0.0
    """When the message came that is being handled: core reads no clock."""

    sequences: dict[SequenceId, Sequence] = field(default_factory=dict)
    running: list[Sequence] = field(default_factory=list)
    """In serving order."""
    resuming: list[Sequence] = field(default_factory=list)
    parked: list[Sequence] = field(default_factory=list)
    """In serving order."""
    paused: list[Sequence] = field(default_factory=list)
    """Longest paused first."""
    damaged: set[SequenceId] = field(default_factory=set)
    """Parked sequences that start over once their last iterations, worthless ones, are over."""
    num_waiting: int = 0
    waiting_blocks: int = 0
    """Blocks that the waiting sequences' tokens need."""
    lanes: SlotPool = field(init=False)
    guidance: Guidance = field(init=False)
    growth: Growth = field(default_factory=Growth)
    counts: Counts = field(default_factory=Counts)
    _waiting: list[tuple[tuple[int, int], Sequence]] = field(default_factory=list)
    _followers: dict[SequenceId, list[Sequence]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lanes = SlotPool("lane", self.max_running)
        self.guidance = Guidance(self.max_running)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_tokens)

    @property
    def growth_reserve(self) -> int:
        """Blocks that running and resuming sequences are to find when they grow."""
        return round(self.growth.blocks * (len(self.running) + len(self.resuming)))

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

    # --- moves --------------------------------------------------------------------------------

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
        self.growth.parked()

    def _set_aside(self, seq: Sequence) -> None:
        self._leave_lane(seq)
        seq.move_to(State.PARKED)
        insort(self.parked, seq, key=_by_order)
        self._let_blocks_leave(seq)

    def pause(self, seq: Sequence) -> None:
        """Stop a sequence that nobody reads, wherever it is, and keep its KV."""
        self._leave(seq)
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

    def _begin_anew(self, seq: Sequence) -> None:
        self._forget_kv(seq)
        seq.move_to(State.WAITING)
        self._enqueue(seq)
        if not seq.is_read:
            self.pause(seq)
        self.counts.sequences_begun_anew += 1

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """Take a sequence out of its queue and its memory back."""
        self._leave(seq)
        seq.move_to(State.FINISHED)
        self._release_table(seq)
        del self.sequences[seq.id]
        self.guidance.finished(seq)
        self.damaged.discard(seq.id)
        self._free_followers(seq)
        self.counts.sequences_finished += 1
        self.growth.ended()
        self.counts.sequences_cancelled += reason == "abort"

    # --- followers ----------------------------------------------------------------------------

    def _follow(self, leader: Sequence, seq: Sequence) -> None:
        """Have it wait until the other one has computed the prompt of both."""
        self.num_waiting += 1
        seq.is_follower = True
        self._followers.setdefault(leader.id, []).append(seq)

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

    # --- parts of moves -----------------------------------------------------------------------

    def _enqueue(self, seq: Sequence) -> None:
        heapq.heappush(self._waiting, (seq.order, seq))
        self.num_waiting += 1
        self.waiting_blocks += self.blocks_for(len(seq.tokens))

    def _leave(self, seq: Sequence) -> None:
        """Out of the queue that it is in."""
        match seq.state:
            case State.RUNNING:
                self._leave_lane(seq)
            case State.PARKED:
                self.parked.remove(seq)
            case State.RESUMING:
                self.resuming.remove(seq)
            case State.PAUSED:
                self.paused.remove(seq)
            case _:
                self._leave_queue(seq)

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

    def _let_blocks_leave(self, seq: Sequence) -> None:
        seq.demote_from = 0
        self._stop_streaming(seq.table)

    def _stop_streaming(self, blocks: Iterable[Block]) -> None:
        """What of these no running sequence reads."""
        for block in blocks:
            if block.is_streamed and not is_read_by_running(block):
                self.residency.unstage(block)

    def _forget_kv(self, seq: Sequence) -> None:
        """All its tokens are to be computed again."""
        self._release_table(seq)
        seq.num_launched = seq.num_settled = seq.num_sealed = seq.demote_from = 0

    def _release_table(self, seq: Sequence) -> None:
        for block in reversed(seq.table):  # a cached block without those before it is no use
            self.residency.release(block, seq)
        self._stop_streaming(seq.table)  # to others that own it and do not run
        seq.table.clear()
        seq.dirty_from = None


def is_readable(seq: Sequence) -> bool:
    """Whether an iteration could read all of its blocks."""
    return all(block.read_slot is not None for block in seq.table)


def is_read_by_running(block: Block) -> bool:
    return any(seq.state in (State.RUNNING, State.RESUMING) for seq in block.owners)
