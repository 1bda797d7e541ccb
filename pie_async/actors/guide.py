"""Owns the guides of sequences: has their masks made beside the loop, and says which are ready."""

from __future__ import annotations

from typing import assert_never

from pie_async.device.protocol import Guides
from pie_async.ids import SequenceId
from pie_async.messages import (
    ForgetGuides,
    GuideMail,
    MakeMasks,
    MaskOrder,
    MasksMade,
    SchedulerMail,
)
from pie_async.runtime.actor import Actor, Observer
from pie_async.runtime.mailbox import Mailbox

SLOW_S = 0.5e-3
"""A guide whose last mask took so long is asked apart from the others, which need not wait for
it."""


class GuideActor(Actor[GuideMail]):
    """Turns orders into masks. What is quick comes in one fact, each of the others in its own."""

    def __init__(
        self,
        guides: Guides,
        scheduler: Mailbox[SchedulerMail],
        *,
        capacity: int,
        observer: Observer | None = None,
    ) -> None:
        super().__init__("guide", capacity=capacity, observer=observer)
        self._guides = guides
        self._scheduler = scheduler
        self._slow: set[SequenceId] = set()
        self._busy: set[SequenceId] = set()
        self._ended: set[SequenceId] = set()
        """Those whose masks were still being made when they ended."""

    async def run(self) -> None:
        """See `Actor`."""
        try:
            await super().run()
        finally:
            self._guides.close()

    def handle(self, mail: GuideMail) -> None:
        match mail:
            case MakeMasks():
                for orders in self._split(mail.orders):
                    self._busy.update(order.sequence for order in orders)
                    self.follow_up("masks", self._make(orders))
            case ForgetGuides():
                self._slow.difference_update(mail.sequences)
                busy = self._busy.intersection(mail.sequences)
                self._ended |= busy
                self._guides.forget(tuple(set(mail.sequences) - busy))
            case _:
                assert_never(mail)

    def _split(self, orders: tuple[MaskOrder, ...]) -> list[tuple[MaskOrder, ...]]:
        """Those made quickly, and each of the others: slow last time, or to be compiled first."""
        apart = {o.sequence for o in orders if o.guide is not None or o.sequence in self._slow}
        quick = tuple(order for order in orders if order.sequence not in apart)
        rest = [(order,) for order in orders if order.sequence in apart]
        return [quick, *rest] if quick else list(rest)

    async def _make(self, orders: tuple[MaskOrder, ...]) -> None:
        masks = await self._guides.make(orders)
        for mask in masks:
            self._busy.discard(mask.sequence)
            (self._slow.add if mask.made_s > SLOW_S else self._slow.discard)(mask.sequence)
        if ended := self._ended.intersection(mask.sequence for mask in masks):
            self._ended -= ended
            self._slow -= ended
            self._guides.forget(tuple(ended))
        self._scheduler.post(MasksMade(masks=masks))
