"""Owns the d2h stream and the host pool's memory: copies blocks to the pool, whose device slots are
free once it says so, and gives memory back that the pool has not needed for a while."""

from __future__ import annotations

import asyncio
import contextlib
from typing import assert_never

import msgspec

from pie_async.core.lost_copies import Patience, split
from pie_async.device.protocol import CopyResult, SwapOutQueue
from pie_async.errors import MailboxClosed
from pie_async.messages import (
    ResizePool,
    ReviewPool,
    SchedulerMail,
    SwapOut,
    SwapOutMail,
    SwappedOut,
)
from pie_async.runtime.actor import Actor, Observer
from pie_async.runtime.mailbox import Mailbox


class PoolReview(msgspec.Struct, frozen=True, kw_only=True):
    """When to ask how large the host pool should be."""

    every_s: float
    slots: int
    """That it has, or is about to have, from the start."""
    least_slots: int
    """That it always has: then there is nothing to ask until a block comes."""


class SwapOutActor(Actor[SwapOutMail]):
    """Demotes blocks. A block is written to the pool once and only read from then on."""

    def __init__(
        self,
        queue: SwapOutQueue,
        scheduler: Mailbox[SchedulerMail],
        *,
        review: PoolReview | None = None,
        observer: Observer | None = None,
    ) -> None:
        """
        Args:
            review: None: the pool keeps its size.
        """
        super().__init__("swap_out", capacity=64, observer=observer)
        self._queue = queue
        self._scheduler = scheduler
        self._review = review
        self._slots = 0 if review is None else review.slots
        self._timer: asyncio.TimerHandle | None = None
        self._patience = Patience("to the pool")

    async def run(self) -> None:
        """See `Actor`."""
        self._await_review()
        try:
            await super().run()
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def handle(self, mail: SwapOutMail) -> None:
        match mail:
            case SwapOut():
                self.follow_up("swapped_out", self._announce(mail, self._queue.demote(mail.moves)))
                self._await_review()
            case ResizePool():
                if mail.slots != self._slots:
                    self._slots = mail.slots
                    self._queue.resize_pool(mail.slots)
                if self._review is not None and mail.slots > self._review.least_slots:
                    self._await_review()
            case _:
                assert_never(mail)

    async def _announce(self, mail: SwapOut, copied: asyncio.Future[CopyResult]) -> None:
        result = await asyncio.shield(copied)
        self._patience.take(result.damaged)
        blocks, failed = split(mail.moves, result.damaged)
        self._scheduler.post(
            SwappedOut(
                blocks=blocks,
                swapped_bytes=result.copied_bytes,
                busy_s=result.busy_s,
                failed=failed,
                failed_attempts=result.failed_attempts,
            )
        )

    def _await_review(self) -> None:
        """Ask a period from now. A timer, for a follow-up would keep the actor from ending."""
        if self._review is not None and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._review.every_s, self._ask)

    def _ask(self) -> None:
        self._timer = None
        with contextlib.suppress(MailboxClosed):  # the engine is ending
            self._scheduler.post(ReviewPool())
