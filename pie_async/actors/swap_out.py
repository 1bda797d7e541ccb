"""Owns the d2h stream: copies blocks to the pool; their device slots are free once it says so."""

from __future__ import annotations

import asyncio

from pie_async.device.protocol import CopyResult, SwapOutQueue
from pie_async.messages import SchedulerMail, SwapOut, SwapOutMail, SwappedOut
from pie_async.runtime.actor import Actor, Observer
from pie_async.runtime.mailbox import Mailbox


class SwapOutActor(Actor[SwapOutMail]):
    """Demotes blocks. A block is written to the pool once and only read from then on."""

    def __init__(
        self,
        queue: SwapOutQueue,
        scheduler: Mailbox[SchedulerMail],
        *,
        observer: Observer | None = None,
    ) -> None:
        super().__init__("swap_out", capacity=64, observer=observer)
        self._queue = queue
        self._scheduler = scheduler

    def handle(self, mail: SwapOutMail) -> None:
        self.follow_up("swapped_out", self._announce(mail, self._queue.demote(mail.moves)))

    async def _announce(self, mail: SwapOut, copied: asyncio.Future[CopyResult]) -> None:
        result = await asyncio.shield(copied)
        self._scheduler.post(
            SwappedOut(
                blocks=tuple(move.block for move in mail.moves),
                swapped_bytes=result.copied_bytes,
                busy_s=result.busy_s,
            )
        )
