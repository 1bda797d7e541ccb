"""A load that changes: phases, the clients that put them on an engine, and what is seen of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import msgspec

from pie_async import Engine
from pie_async.cli.load import EngineTarget, Prompts, clock_of
from pie_async.workload import LengthModel, WorkItem, arrive_at_rate, sample_lengths
from scripts.paper.load import FIRST_TOKEN, spent_between

SHORT = LengthModel(prompt_mean=160.0, prompt_spread=0.5, output_mean=200.0, output_spread=0.3)
LONG_PROMPTS = LengthModel(
    prompt_mean=1200.0, prompt_spread=0.3, output_mean=150.0, output_spread=0.3
)
"""Outputs vary little, so that a phase has settled long before it ends: with a long tail the
batch would still age then, and settings with long iterations would look better than they are."""
POLL_S = 0.005


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """A load that lasts for a while."""

    name: str
    lengths: LengthModel
    requests_per_s: float

    def items(self, *, seconds: float, context: int, seed: int) -> list[WorkItem]:
        """Its requests as they arrive, a Poisson process."""
        count = max(1, round(2 * self.requests_per_s * seconds))
        items = sample_lengths(self.lengths, num_requests=count, context_tokens=context, seed=seed)
        arriving = arrive_at_rate(items, requests_per_s=self.requests_per_s, seed=seed)
        return [item for item in arriving if item.arrival_s < seconds]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine did in a part of a phase."""

    seconds: float = 0.0
    own_tokens: int = 0
    """Output tokens of requests that came in this phase."""
    iterations: int = 0
    compute_s: float = 0.0
    stall_s: float = 0.0
    h2d_busy_s: float = 0.0
    streamed_block_s: float = 0.0
    """Streamed blocks, integrated over time."""

    def __add__(self, other: Seen) -> Seen:
        names = self.__struct_fields__
        return Seen(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def tokens_per_s(self) -> float:
        return self.own_tokens / self.seconds if self.seconds else 0.0

    @property
    def stall_share(self) -> float:
        total_s = self.compute_s + self.stall_s
        return self.stall_s / total_s if total_s else 0.0


class PhaseSeen(msgspec.Struct, frozen=True, kw_only=True):
    """A phase: while it was new, and from then to its end."""

    changing: Seen
    settled: Seen
    early_limit_blocks: int
    """That might be streamed between the two."""
    limit_blocks: int
    """That might be streamed at its end."""


async def run_phases(
    engine: Engine,
    phases: Sequence[Phase],
    *,
    seconds: float,
    settling: int,
    context: int,
    seed: int,
) -> list[PhaseSeen]:
    """One phase after the other. Requests that still wait when theirs ends are withdrawn, those
    under way go on.

    Args:
        seconds: of each phase.
        settling: iterations for which it counts as new.

    Raises:
        RuntimeError: a phase was over before it had settled.
    """
    seen = []
    fill = Prompts(vocab_size=engine.model.vocab_size, first_token=FIRST_TOKEN, seed=seed)
    async with asyncio.TaskGroup() as group:
        clients = _Clients(engine, fill, group)
        for number, phase in enumerate(phases):
            clients.begin()
            items = phase.items(seconds=seconds, context=context, seed=seed + 1000 * number)
            arriving = group.create_task(clients.send(items))
            seen.append(await _watched(engine, clients, seconds, settling))
            arriving.cancel()
            clients.withdraw()
        clients.leave()
    for phase, each in zip(phases, seen, strict=True):
        if each.changing.iterations < settling:
            raise RuntimeError(
                f"phase {phase.name!r} had {each.changing.iterations} iterations in {seconds:g} s, "
                f"too few to settle in {settling}; give more --seconds"
            )
    return seen


async def _watched(engine: Engine, clients: _Clients, seconds: float, settling: int) -> PhaseSeen:
    watch = _Watch(engine, clients)
    end_s = watch.began_s + seconds
    changing = await watch.until(end_s, settling)
    early = engine.stats().streamed_limit_blocks
    return PhaseSeen(
        changing=changing,
        settled=await watch.until(end_s, None),
        early_limit_blocks=early,
        limit_blocks=engine.stats().streamed_limit_blocks,
    )


class _Clients:
    """Requests under way, and those that wait."""

    def __init__(self, engine: Engine, fill: Prompts, group: asyncio.TaskGroup) -> None:
        self.own_tokens = 0
        """Output tokens of the present phase's requests."""
        self._target = EngineTarget(engine)
        self._fill = fill
        self._group = group
        self._number = 0
        self._phase = 0
        self._waiting: set[asyncio.Task[None]] = set()
        self._begun: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Another phase: only its requests count."""
        self._phase += 1
        self.own_tokens = 0

    async def send(self, items: Sequence[WorkItem]) -> None:
        """Each at its time, which counts from now."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        for item in items:
            await asyncio.sleep(max(0.0, began_s + item.arrival_s - loop.time()))
            self._number += 1
            prompt = self._fill.of(item, self._number)
            task = self._group.create_task(self._one(item, prompt, self._phase))
            self._waiting.add(task)
            task.add_done_callback(self._ended)

    def withdraw(self) -> None:
        """Those that have not had a token give up."""
        for task in self._waiting:
            task.cancel()

    def leave(self) -> None:
        """All give up."""
        for task in self._waiting | self._begun:
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._waiting.discard(task)
        self._begun.discard(task)

    async def _one(self, item: WorkItem, prompt: list[int], phase: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        stream = self._target.stream(prompt, output_tokens=item.output_tokens)
        async with contextlib.aclosing(stream):
            async for count in stream:
                self._waiting.discard(task)
                self._begun.add(task)
                if phase == self._phase:
                    self.own_tokens += count


class _Watch:
    """Adds up what an engine does from one moment to the next."""

    def __init__(self, engine: Engine, clients: _Clients) -> None:
        self._engine = engine
        self._clients = clients
        self._clock = clock_of(engine.config)
        self.began_s = self._last_s = self._clock()
        self._last = engine.stats()
        self._own_tokens = clients.own_tokens

    async def until(self, end_s: float, iterations: int | None) -> Seen:
        """What happens until then, or until so many iterations are over."""
        first, first_s, block_s = self._last, self._last_s, 0.0
        before = self._own_tokens
        while self._last_s < end_s and not (
            iterations is not None and self._last.iterations - first.iterations >= iterations
        ):
            await asyncio.sleep(POLL_S)
            now_s = self._clock()
            block_s += self._last.streamed_blocks * (now_s - self._last_s)
            self._last, self._last_s = self._engine.stats(), now_s
        self._own_tokens = self._clients.own_tokens
        spent = spent_between(first, self._last)
        return Seen(
            seconds=self._last_s - first_s,
            own_tokens=self._own_tokens - before,
            streamed_block_s=block_s,
            iterations=spent.iterations,
            compute_s=spent.compute_s,
            stall_s=spent.stall_s,
            h2d_busy_s=spent.h2d_busy_s,
        )
