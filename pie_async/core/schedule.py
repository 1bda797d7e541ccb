"""The scheduler's state, and what messages do to it.

Facts and commands come in through the methods below; what to do next comes out of
`batching.plan_iteration`. Nothing here waits or touches a device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field

from pie_async.core.headroom import LINK_SHARE
from pie_async.core.queues import Queues, is_readable
from pie_async.core.sequence import Sequence, State
from pie_async.core.sharing import Sharing
from pie_async.core.staged import Staged
from pie_async.ids import BlockId, HostSlot, IterationId, SequenceId
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

SHRINK_TOLERANCE = 1 / LINK_SHARE
"""How far what runs may go beyond a limit that was lowered, unless it is exact: fixed by the
caller, or there for an ITL limit. Sequences that run go on to it as they grow, none is admitted
there, and beyond it one is parked. It is the part of the link's time that the governor leaves free.
When growth was held to the limit as well, a cut of 10 % left every sequence without its next block
within 16 iterations: of 198 that decoded 73 were left. At 1.1 a host pool stalled for 13 % of 70
iterations in a row, for no cut reached what was beyond the limit."""

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


@dataclass(slots=True, kw_only=True)
class Schedule(Queues):
    """The queues, what is under way, and what may be."""

    token_budget: int
    eos_ids: frozenset[int]
    shares_prefixes: InitVar[bool] = True
    """See `Sharing`."""
    prefix_seed: InitVar[bytes] = b""
    """See `Sharing`."""
    streamed_limit: int = 0
    """Blocks that may be streamed, as the governor says."""
    shrink_tolerance: float = SHRINK_TOLERANCE
    """Sequences that run may stream more than a lowered limit by this factor."""
    least_streamed: int = 0
    """Blocks that are streamed even where everything fits: for measurements."""
    awaits_pool: bool = False
    """More of the host pool is being pinned: what finds no room yet has something to wait for."""
    pauses_unread: bool = True
    """Not while draining: then everything is to be finished, read or not."""
    in_flight: deque[Launched] = field(default_factory=deque)
    promotions: deque[BlockMove] = field(default_factory=deque)
    """Swap-ins that were decided and wait for their turn on the link."""
    sharing: Sharing = field(init=False)
    num_starved: int = 0
    """Running sequences that found no device slot for their next tokens."""
    starved_plans: int = 0
    """For how many plans in a row there were any."""
    _arrivals: int = 0

    def __post_init__(self, shares_prefixes: bool, prefix_seed: bytes) -> None:
        Queues.__post_init__(self)  # `super()` knows nothing of classes that slots made anew
        self.sharing = Sharing(
            self.residency, self.block_tokens, is_on=shares_prefixes, seed=prefix_seed
        )

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

    # --- commands ---------------------------------------------------------------------------

    def submit(self, command: Submit) -> None:
        """Queue a request's sequences. All but the first follow it: they start when its
        prompt is computed, and share its blocks."""
        leader: Sequence | None = None
        prefix_root = self.sharing.hasher.root(command.cache_salt)
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
            if leader is None or not self.sharing.may_share(seq):
                self._enqueue(seq)
                leader = leader or seq
            else:
                self._follow(leader, seq)

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

    # --- what a sequence has computed -----------------------------------------------------------

    def adopt_prefix(self, seq: Sequence) -> None:
        """Give a sequence that has just started the blocks that hold its leading tokens."""
        if not self.sharing.may_share(seq):
            return
        shared = self.sharing.adopt(seq)
        seq.num_launched = seq.num_settled = shared
        seq.num_sealed = len(seq.table)
        if seq.num_cached_tokens is None:  # what it finds when it starts over is mostly its own
            seq.num_cached_tokens = shared
            self.counts.prefix_query_tokens += len(seq.tokens)
            self.counts.prefix_hit_tokens += shared
            self.counts.cached_tokens += shared
        self._free_followers_of_prompt(seq)

    def _seal(self, seq: Sequence) -> None:
        size = self.block_tokens
        for index in range(seq.num_sealed, seq.num_settled // size):
            seq.table[index].is_sealed = True
            self.sharing.enter(seq, index)
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
