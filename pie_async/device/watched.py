"""The launcher's queues, whose unfinished work somebody can ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pie_async.device.launcher import Launcher
from pie_async.device.protocol import CopyResult, PassResult
from pie_async.ids import IterationId
from pie_async.messages import BlockMove, RunIteration, StageIteration
from pie_async.runtime.watchdog import Issued


class WatchedQueues:
    """As `Launcher`; remembers for each stream what was issued and has not completed."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.compute = Issued("compute stream")
        self.h2d = Issued("h2d stream")
        self.d2h = Issued("d2h stream")

    def run(self, command: RunIteration) -> asyncio.Future[PassResult]:
        ran = self._launcher.run(command)
        num_tokens = sum(row.num_tokens for row in command.rows)
        self.compute.add(f"iteration {command.iteration} of {num_tokens} tokens", ran)
        return ran

    def sample(self, iteration: IterationId) -> None:
        self._launcher.sample(iteration)

    def stage(self, command: StageIteration) -> asyncio.Future[CopyResult]:
        staged = self._launcher.stage(command)
        num_blocks = sum(run.count for run in command.runs)
        self.h2d.add(f"staging {num_blocks} blocks for iteration {command.iteration}", staged)
        return staged

    def promote(self, moves: Sequence[BlockMove]) -> asyncio.Future[CopyResult]:
        copied = self._launcher.promote(moves)
        self.h2d.add(f"promoting {len(moves)} blocks", copied)
        return copied

    def demote(self, moves: Sequence[BlockMove]) -> asyncio.Future[CopyResult]:
        copied = self._launcher.demote(moves)
        self.d2h.add(f"demoting {len(moves)} blocks", copied)
        return copied

    def resize_pool(self, slots: int) -> None:
        self._launcher.resize_pool(slots)
