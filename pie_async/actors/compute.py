"""Owns the compute stream: runs iterations in order and reports what they cost."""

from __future__ import annotations

import asyncio
from typing import assert_never

from pie_async.device.protocol import ComputeQueue, PassResult
from pie_async.ids import IterationId
from pie_async.messages import (
    ComputeMail,
    IterationRan,
    RunIteration,
    SampleIteration,
    SchedulerMail,
)
from pie_async.runtime.actor import Actor, Observer
from pie_async.runtime.mailbox import Mailbox


class ComputeActor(Actor[ComputeMail]):
    """Turns iterations into launches. A device fault ends it, and with it the engine."""

    def __init__(
        self,
        queue: ComputeQueue,
        scheduler: Mailbox[SchedulerMail],
        *,
        observer: Observer | None = None,
    ) -> None:
        super().__init__("compute", capacity=8, observer=observer)
        self._queue = queue
        self._scheduler = scheduler
        self._announced = asyncio.Event()  # the iteration issued last
        self._announced.set()

    def handle(self, mail: ComputeMail) -> None:
        match mail:
            case RunIteration():
                self._run(mail)
            case SampleIteration():
                self._queue.sample(mail.iteration)
            case _:
                assert_never(mail)

    def _run(self, command: RunIteration) -> None:
        before, self._announced = self._announced, asyncio.Event()
        ran = self._queue.run(command)
        self.follow_up("announce", self._announce(command.iteration, ran, before, self._announced))

    async def _announce(
        self,
        iteration: IterationId,
        ran: asyncio.Future[PassResult],
        before: asyncio.Event,
        announced: asyncio.Event,
    ) -> None:
        result = await asyncio.shield(ran)
        # Iterations end in order but the waits for them may not: on a busy loop this one can
        # be over before its wait began.
        await before.wait()
        self._scheduler.post(
            IterationRan(
                iteration=iteration,
                sampled=result.sampled,
                prompt_logprobs=result.prompt_logprobs,
                compute_s=result.compute_s,
                stall_s=result.stall_s,
                mask_wait_s=result.mask_wait_s,
                unstaged=result.unstaged,
            )
        )
        announced.set()
