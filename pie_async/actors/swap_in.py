"""Owns the h2d stream: stages streamed blocks ahead of compute, brings pooled ones home."""

from __future__ import annotations

import asyncio
from typing import assert_never

from pie_async.core.lost_copies import Patience, split
from pie_async.device.protocol import CopyResult, SwapInQueue
from pie_async.messages import (
    IterationStaged,
    SchedulerMail,
    StageIteration,
    SwapIn,
    SwapInMail,
    SwappedIn,
)
from pie_async.runtime.actor import Actor, Observer
from pie_async.runtime.mailbox import Mailbox


class SwapInActor(Actor[SwapInMail]):
    """Gives the device the staging half of iterations, and promotes blocks."""

    def __init__(
        self,
        queue: SwapInQueue,
        scheduler: Mailbox[SchedulerMail],
        *,
        observer: Observer | None = None,
    ) -> None:
        super().__init__("swap_in", capacity=64, observer=observer)
        self._queue = queue
        self._scheduler = scheduler
        self._patience = Patience("to the device")

    def handle(self, mail: SwapInMail) -> None:
        match mail:
            case StageIteration():
                self.follow_up("staged", self._announce_staged(mail, self._queue.stage(mail)))
            case SwapIn():
                copied = self._queue.promote(mail.moves)
                self.follow_up("swapped_in", self._announce_swapped_in(mail, copied))
            case _:
                assert_never(mail)

    async def _announce_staged(
        self, mail: StageIteration, copied: asyncio.Future[CopyResult]
    ) -> None:
        result = await asyncio.shield(copied)
        self._patience.take(result.damaged)
        self._scheduler.post(
            IterationStaged(
                iteration=mail.iteration,
                staged_bytes=result.copied_bytes,
                busy_s=result.busy_s,
                failed_attempts=result.failed_attempts,
                written_back_bytes=result.written_back_bytes,
            )
        )

    async def _announce_swapped_in(self, mail: SwapIn, copied: asyncio.Future[CopyResult]) -> None:
        result = await asyncio.shield(copied)
        self._patience.take(result.damaged)
        blocks, failed = split(mail.moves, result.damaged)
        self._scheduler.post(
            SwappedIn(
                blocks=blocks,
                swapped_bytes=result.copied_bytes,
                busy_s=result.busy_s,
                failed=failed,
                failed_attempts=result.failed_attempts,
            )
        )
