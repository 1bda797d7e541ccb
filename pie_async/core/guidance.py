"""Masks of guided sequences: which are wanted, being made, ready and being read.

A guided sequence samples under a mask that depends on all its output. Where masks are made quickly
it is launched without: while the device computes the layers, the token before becomes known and
the mask is made, and only then sampling is issued, for the whole iteration. The sequences of slow
guides have one token in flight at most, and are left out of iterations until their next masks are
ready; the others go on. So it is with all guides while the device waits too long for late masks,
and others with it: where an iteration is over before the host has been told of the one before.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from pie_async.core.sequence import Sequence
from pie_async.core.slots import SlotPool
from pie_async.ids import MaskSlot, SequenceId
from pie_async.messages import MaskMade, MaskOrder, Row

MASKS_PER_LANE = 2
"""One that is made or ready, one that an iteration still reads for whoever was there before."""
MOST_PATIENCE_S = 2e-3
PATIENCE = 0.25
"""How long anybody waits for a mask: so much of the last iteration's time, at most the above. The
device is busy meanwhile. Most masks take 20 to 100 us, those of a complex grammar may take tens of
milliseconds."""
SMOOTHING = 1 / 8
MOST_SHARE = 2 * PATIENCE
"""That one iteration counts for: the first mask of a guide takes long, and says nothing."""
PAUSE_ITERATIONS = 128
"""In which no mask is late, after others have waited too long: then it is tried anew."""


class Guidance:
    """The books of one engine's masks. A slot is in one of three places, or free:

    ordered, until the guide has answered; ready, until a row is launched with it or its sequence
    leaves its lane; with a row, until its iteration has settled. A late row's mask is ordered when
    its slot is with the row already.
    """

    def __init__(self, lanes: int) -> None:
        self.slots = SlotPool("mask", MASKS_PER_LANE * lanes)
        self.ordered: dict[SequenceId, MaskSlot] = {}
        self.ready: dict[SequenceId, MaskSlot] = {}
        self.late: dict[SequenceId, MaskSlot] = {}
        """Of rows of the newest iteration whose masks are not made: it may not sample before."""
        self._quick: set[SequenceId] = set()
        """Guided sequences whose last masks did not take longer than that."""
        self.patience_s = MOST_PATIENCE_S
        self._wait_share = 0.0
        """Time that compute waited for late masks, of that in which it worked; smoothed."""
        self._pause = 0
        """Iterations in which none is late, if others would wait."""
        self._has_neighbours = False
        """Rows without a mask were sampled in the last iteration."""
        self._known: dict[SequenceId, int] = {}
        """Output tokens that a sequence's guide was told of, once it has one."""
        self._ended: list[SequenceId] = []
        self.num_guided = 0
        """Guided sequences that have not ended."""

    def iteration_took(self, compute_s: float, mask_wait_s: float = 0.0) -> None:
        """Of the device; `settled` comes before."""
        self.patience_s = min(MOST_PATIENCE_S, PATIENCE * compute_s)
        self._pause = max(0, self._pause - 1)
        if mask_wait_s > 0 and compute_s > 0:
            share = min(mask_wait_s / compute_s, MOST_SHARE)
            self._wait_share += SMOOTHING * (share - self._wait_share)
        if self._wait_share > PATIENCE and self._has_neighbours:
            self._wait_share, self._pause = 0.0, PAUSE_ITERATIONS

    # --- orders -------------------------------------------------------------------------------

    def orders(self, running: Iterable[Sequence]) -> tuple[MaskOrder, ...]:
        """Masks that these sequences need next and that nobody has ordered."""
        if not self.num_guided:
            return ()
        wanting = (seq for seq in running if self._lacks(seq))
        return tuple(order for seq in wanting if (order := self._order(seq)) is not None)

    def is_wanted(self, running: Iterable[Sequence]) -> bool:
        """Whether one of these sequences waits for a mask, ordered or not."""
        return bool(self.ordered) or (self.num_guided > 0 and any(map(self._lacks, running)))

    def _lacks(self, seq: Sequence) -> bool:
        is_coming = seq.id in self.ready or seq.id in self.ordered
        return seq.is_guided and not is_coming and seq.samples_in_flight == 0

    def late_orders(
        self, sequences: Mapping[SequenceId, Sequence], damaged: Container[SequenceId]
    ) -> tuple[MaskOrder, ...]:
        """Masks of late rows whose tokens have become known. Rows need none whose sequences have
        ended or are damaged: nothing comes of them."""
        orders = []
        for sequence_id in [each for each in self.late if each not in self.ordered]:
            seq = sequences.get(sequence_id)
            if seq is None or sequence_id in damaged:
                del self.late[sequence_id]
            elif seq.samples_in_flight == 1:
                orders.append(self._order_into(self.late[sequence_id], seq))
        return tuple(orders)

    def _order(self, seq: Sequence) -> MaskOrder | None:
        slot = self.slots.take()
        if slot is None:
            return None  # some that have ended are still read; they come back
        return self._order_into(MaskSlot(slot), seq)

    def _order_into(self, slot: MaskSlot, seq: Sequence) -> MaskOrder:
        known = self._known.get(seq.id)
        self._known[seq.id] = seq.num_outputs
        self.ordered[seq.id] = slot
        tokens = tuple(seq.tokens[seq.prompt_len + (known or 0) :])
        guide = seq.sampling.structured_outputs if known is None else None
        return MaskOrder(seq.id, slot, tokens, guide)

    def made(self, mask: MaskMade, *, is_running: bool) -> None:
        """An order was carried out, whoever still wants it."""
        slot = self.ordered.pop(mask.sequence)
        assert slot == mask.slot, f"sequence {mask.sequence} ordered another mask"
        is_usable = is_running and not mask.is_ended and mask.refusal is None
        (self._quick.add if is_usable and mask.made_s <= self.patience_s else self._quick.discard)(
            mask.sequence
        )
        if self.late.pop(mask.sequence, None) is not None:
            return  # the row has it
        if is_usable:
            self.ready[mask.sequence] = slot
        else:
            self.slots.give_back(slot)

    # --- use ----------------------------------------------------------------------------------

    def may_sample(self, seq: Sequence) -> bool:
        """Whether a row of this sequence could sample now."""
        return not seq.is_guided or seq.id in self.ready

    def may_be_late(self, seq: Sequence) -> bool:
        """Whether a row of this sequence could be launched before its mask can be made."""
        is_near = seq.samples_in_flight == 1 and seq.id in self._quick
        others_would_wait = self._pause > 0 and self._has_neighbours
        return is_near and not others_would_wait and self.slots.num_free > 0

    def take(self, seq: Sequence) -> MaskSlot | None:
        """The mask for a row that samples, made or late; None if anything may be sampled."""
        if not seq.is_guided:
            return None
        if seq.id in self.ready:
            return self.ready.pop(seq.id)
        slot = self.slots.take()
        assert slot is not None, "may_be_late() comes before"
        self.late[seq.id] = MaskSlot(slot)
        return self.late[seq.id]

    def settled(self, rows: Iterable[Row]) -> None:
        """The iteration that read these rows' masks is over."""
        self._has_neighbours = False
        for row in rows:
            if row.mask is not None:
                self.slots.give_back(row.mask)
            elif row.is_sampled:
                self._has_neighbours = True

    # --- ends ---------------------------------------------------------------------------------

    def left_lane(self, seq: Sequence) -> None:
        """Its mask can be made again: slots are for those that run."""
        if (slot := self.ready.pop(seq.id, None)) is not None:
            self.slots.give_back(slot)

    def finished(self, seq: Sequence) -> None:
        """It needs no guide any more."""
        self.num_guided -= seq.is_guided
        self._quick.discard(seq.id)
        if self._known.pop(seq.id, None) is not None:
            self._ended.append(seq.id)

    def take_ended(self) -> tuple[SequenceId, ...]:
        """Sequences that ended since the last call, whose guides are to be forgotten."""
        ended = tuple(self._ended)
        self._ended.clear()
        return ended
