"""Masks of guided sequences: which are wanted, being made, ready and being read.

A guided sequence samples under a mask that depends on all its output, so it has one token in
flight at most, and is left out of iterations until its next mask is ready. The others go on.
"""

from __future__ import annotations

from collections.abc import Iterable

from pie_async.core.sequence import Sequence
from pie_async.core.slots import SlotPool
from pie_async.ids import MaskSlot, SequenceId
from pie_async.messages import MaskMade, MaskOrder, Row

MASKS_PER_LANE = 2
"""One that is made or ready, one that an iteration still reads for whoever was there before."""


class Guidance:
    """The books of one engine's masks. A slot is in one of three places, or free:

    ordered, until the guide has answered; ready, until a row is launched with it or its sequence
    leaves its lane; with a row, until its iteration has settled.
    """

    def __init__(self, lanes: int) -> None:
        self.slots = SlotPool("mask", MASKS_PER_LANE * lanes)
        self.ordered: dict[SequenceId, MaskSlot] = {}
        self.ready: dict[SequenceId, MaskSlot] = {}
        self._known: dict[SequenceId, int] = {}
        """Output tokens that a sequence's guide was told of, once it has one."""
        self._ended: list[SequenceId] = []
        self.num_guided = 0
        """Guided sequences that have not ended."""

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

    def _order(self, seq: Sequence) -> MaskOrder | None:
        slot = self.slots.take()
        if slot is None:
            return None  # some that have ended are still read; they come back
        known = self._known.get(seq.id)
        self._known[seq.id] = seq.num_outputs
        self.ordered[seq.id] = MaskSlot(slot)
        tokens = tuple(seq.tokens[seq.prompt_len + (known or 0) :])
        guide = seq.sampling.structured_outputs if known is None else None
        return MaskOrder(seq.id, MaskSlot(slot), tokens, guide)

    def made(self, mask: MaskMade, *, is_running: bool) -> None:
        """An order was carried out, whoever still wants it."""
        slot = self.ordered.pop(mask.sequence)
        assert slot == mask.slot, f"sequence {mask.sequence} ordered another mask"
        if is_running and not mask.is_ended and mask.refusal is None:
            self.ready[mask.sequence] = slot
        else:
            self.slots.give_back(slot)

    # --- use ----------------------------------------------------------------------------------

    def may_sample(self, seq: Sequence) -> bool:
        """Whether a row of this sequence could sample now."""
        return not seq.is_guided or seq.id in self.ready

    def take(self, seq: Sequence) -> MaskSlot | None:
        """The mask for a row that samples; None if anything may be sampled."""
        return self.ready.pop(seq.id) if seq.is_guided else None

    def settled(self, rows: Iterable[Row]) -> None:
        """The iteration that read these rows' masks is over."""
        for row in rows:
            if row.mask is not None:
                self.slots.give_back(row.mask)

    # --- ends ---------------------------------------------------------------------------------

    def left_lane(self, seq: Sequence) -> None:
        """Its mask can be made again: slots are for those that run."""
        if (slot := self.ready.pop(seq.id, None)) is not None:
            self.slots.give_back(slot)

    def finished(self, seq: Sequence) -> None:
        """It needs no guide any more."""
        self.num_guided -= seq.is_guided
        if self._known.pop(seq.id, None) is not None:
            self._ended.append(seq.id)

    def take_ended(self) -> tuple[SequenceId, ...]:
        """Sequences that ended since the last call, whose guides are to be forgotten."""
        ended = tuple(self._ended)
        self._ended.clear()
        return ended
