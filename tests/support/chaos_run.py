"""Runs the whole engine through what a seed drew, and checks what must hold at the end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import pie_async.engine
from pie_async.assembly import Parts, assemble, with_faults
from pie_async.engine import Engine
from pie_async.errors import EngineStopped, InvalidRequest, Overloaded, PieError
from pie_async.metrics import EngineStats
from pie_async.request_stream import RequestStream
from pie_async.runtime.faults import FaultPlan, Faults
from pie_async.testing import check_answered, check_returned, run_in_virtual_time
from tests.support import chaos_api
from tests.support.chaos import Chaos, Client, describe, spread
from tests.support.chaos_checks import Seen, check_outputs
from tests.support.chaos_world import delay_mail, vary_times, withhold_pool
from tests.support.soak import BLOCK_BYTES, PATIENCE_S


class ChaosFailed(AssertionError):
    """A seed ended wrongly; names the command that replays it."""


@dataclass
class Outcome:
    """What came of a seed."""

    virtual_s: float = 0.0
    messages: int = 0
    stats: EngineStats = field(default_factory=EngineStats)
    bites: dict[str, int] = field(default_factory=dict)
    """How often each fault point bit."""
    endings: dict[str, int] = field(default_factory=dict)
    """How many outputs ended how: a finish reason, or the name of an error."""
    story: bytes = b""
    """Every message handled, and what every client saw."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.story).hexdigest()


def run(
    seed: int,
    *,
    through_api: bool = False,
    change: Callable[[Engine], None] | None = None,
) -> Outcome:
    """Run a seed on virtual time.

    Args:
        through_api: its clients speak OpenAI's dialect; see `chaos_api`.
        change: done to the engine once it has started, for tests of this.

    Raises:
        ChaosFailed: tokens are wrong or missing, something was not returned, the engine
            stopped, or it did not end.
    """
    chaos = Chaos.of(seed)
    engine = _engine(chaos)
    try:
        return run_in_virtual_time(
            _run(engine, chaos, API if through_api else ENGINE, change), order_seed=chaos.seed
        )
    except (Exception, ExceptionGroup) as error:
        last = engine.story.tell(last=12) if engine.story is not None else ""
        raise ChaosFailed(
            f"seed {seed}: {_first(error)!r}\nreplay it with: scripts/chaos "
            f"{'--api ' if through_api else ''}--seed {seed}\n"
            f"{describe(chaos)}\nwhat happened last:\n{last}"
        ) from error


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _engine(chaos: Chaos) -> Engine:
    return Engine(
        device="sim",
        model="tiny",
        debug=True,
        check_copies=True,
        faults=FaultPlan(faults=chaos.faults),
        device_kv_bytes=chaos.device_blocks * BLOCK_BYTES,
        host_pool_bytes=chaos.host_blocks * BLOCK_BYTES,
        **chaos.options,
    )


async def _run(
    engine: Engine, chaos: Chaos, surface: Surface, change: Callable[[Engine], None] | None
) -> Outcome:
    await _start(engine, chaos)
    if change is not None:
        change(engine)
    seen = [[Seen() for _ in range(client.params.n)] for client in chaos.clients]
    async with asyncio.timeout(PATIENCE_S):
        await _serve(engine, chaos, surface, seen)
    outcome = Outcome(virtual_s=asyncio.get_running_loop().time(), stats=engine.stats())
    await _check_end(engine, chaos)
    for client, outputs in zip(chaos.clients, seen, strict=True):
        surface.check(engine, chaos, client, outputs)
        for output in outputs:
            outcome.endings[str(output.end)] = outcome.endings.get(str(output.end), 0) + 1
    assert engine.story is not None and engine.faults is not None
    outcome.bites = dict(engine.faults.bites)
    outcome.messages = len(engine.story)
    clients = repr([[(out.tokens, out.text, out.end) for out in outs] for outs in seen])
    outcome.story = engine.story.to_bytes() + clients.encode()
    return outcome


async def _start(engine: Engine, chaos: Chaos) -> None:
    def assemble_chaos(config: Any, *, progress: Any = None, faults: Faults) -> Parts:
        return with_faults(withhold_pool(assemble(config, progress=progress), chaos.pool), faults)

    with mock.patch.object(pie_async.engine, "assemble", assemble_chaos):
        await engine.start()
    vary_times(engine, chaos, spread)
    delay_mail(engine, chaos)
    assert engine.story is not None
    engine.story.keep_all()


async def _serve(engine: Engine, chaos: Chaos, surface: Surface, seen: list[list[Seen]]) -> None:
    """Until all clients are gone and the engine is idle, closed or, if that was drawn, dead."""
    async with asyncio.TaskGroup() as group:
        for number in range(len(chaos.clients)):
            group.create_task(surface.visit(engine, chaos, number, seen[number]))
        if chaos.closes_at_s is not None:
            await asyncio.sleep(chaos.closes_at_s)
            await engine.aclose(drain_s=chaos.drain_s)
    if chaos.closes_at_s is None and engine.is_running:
        with contextlib.suppress(EngineStopped):  # `failure` says more
            await engine.drain()


async def _check_end(engine: Engine, chaos: Chaos) -> None:
    if engine.failure is None:
        check_returned(engine)
        assert engine.story is not None
        check_answered(engine.story)
    await engine.aclose()
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    assert not rest, f"tasks left: {rest}"
    if engine.failure is not None and not chaos.is_meant(engine.failure):
        raise engine.failure


# --- clients ----------------------------------------------------------------------------------


async def _client(engine: Engine, chaos: Chaos, number: int, seen: list[Seen]) -> None:
    client = chaos.clients[number]
    await asyncio.sleep(client.at_s)
    name = f"client-{number}"
    try:
        stream = await engine.submit(
            client.prompt,
            client.params,
            request_id=name,
            priority=client.priority,
            cache_salt=client.cache_salt,
        )
    except (Overloaded, EngineStopped, InvalidRequest) as refusal:
        if engine.failure is not None and not chaos.is_meant(engine.failure):
            raise
        for output in seen:
            output.end = type(refusal).__name__
        return
    if client.manner == "never reads":
        return
    reading = asyncio.create_task(_read(stream, client, seen), name=name)
    if client.manner == "is slow" or client.manner == "reads":
        await _ended(chaos, reading, seen)
        return
    await asyncio.wait([reading], timeout=client.patience_s)
    if client.manner == "cancels":
        stream.cancel()
    elif client.manner == "cancels by name":
        await engine.cancel(name)
    else:
        reading.cancel()
        await asyncio.wait([reading])
        await stream.aclose()
        if reading.cancelled():
            return
    await _ended(chaos, reading, seen)


async def _read(stream: RequestStream, client: Client, seen: list[Seen]) -> None:
    async for output in stream:
        for out in output.outputs:
            seen[out.index].tokens += out.token_ids
            seen[out.index].text += out.text
            seen[out.index].end = out.finish_reason
        if client.manner == "is slow":
            await asyncio.sleep(client.patience_s)


async def _ended(chaos: Chaos, reading: asyncio.Task[None], seen: list[Seen]) -> None:
    try:
        await reading
    except PieError as error:
        if not isinstance(error, EngineStopped) and not chaos.is_meant(error):
            raise
        for output in seen:
            output.end = output.end or type(error).__name__


class Surface(NamedTuple):
    """How clients reach the engine, and what is checked of what they saw."""

    visit: Callable[[Engine, Chaos, int, list[Seen]], Coroutine[Any, Any, None]]
    check: Callable[[Engine, Chaos, Client, list[Seen]], None]


ENGINE = Surface(_client, check_outputs)
API = Surface(chaos_api.visit, chaos_api.check_texts)
