"""What an actor under test is connected to: empty mailboxes and queues that answer on call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pie_async.actors.scheduler import Neighbours
from pie_async.device.protocol import CopyResult, PassResult
from pie_async.ids import IterationId
from pie_async.messages import BlockMove, RunIteration, StageIteration
from pie_async.runtime.mailbox import Mailbox


class Queues:
    """All three device queues: notes what is asked; the test settles the futures."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.futures: list[asyncio.Future[Any]] = []

    def run(self, command: RunIteration) -> asyncio.Future[PassResult]:
        return self._note("run", command)

    def sample(self, iteration: IterationId) -> None:
        self.asked.append(("sample", iteration))

    def stage(self, command: StageIteration) -> asyncio.Future[CopyResult]:
        return self._note("stage", command)

    def promote(self, moves: Sequence[BlockMove]) -> asyncio.Future[CopyResult]:
        return self._note("promote", moves)

    def demote(self, moves: Sequence[BlockMove]) -> asyncio.Future[CopyResult]:
        return self._note("demote", moves)

    def _note(self, what: str, asked: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked.append((what, asked))
        self.futures.append(future)
        return future


def mailboxes(*, with_governor: bool = True, with_guide: bool = False) -> Neighbours:
    """Mailboxes that nobody reads."""
    return Neighbours(
        compute=Mailbox("compute", 8),
        swap_in=Mailbox("swap_in", 64),
        swap_out=Mailbox("swap_out", 64),
        delivery=Mailbox("delivery", 64),
        governor=Mailbox("governor", 64) if with_governor else None,
        guide=Mailbox("guide", 64) if with_guide else None,
    )


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
