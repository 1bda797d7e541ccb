"""Every wait of the engine, taken away in turn: the happens-before checker must say so.

Waits are events on streams (the launcher's) and things that the host does only once it has heard
of an event (the scheduler's and the actors'). A wait that can be missing unnoticed is either
needless or a hole in the checker.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import NamedTuple
from unittest import mock

import pytest

from pie_async.actors.swap_in import SwapInActor
from pie_async.actors.swap_out import SwapOutActor
from pie_async.core.batching import _Batch
from pie_async.core.prefix_cache import PrefixCache
from pie_async.core.residency import ResidencyMap
from pie_async.device import launcher
from pie_async.device.happens_before import UnorderedAccess
from pie_async.device.sim import SimStream
from pie_async.engine import Engine
from pie_async.errors import EngineStopped
from pie_async.messages import SwappedIn, SwappedOut
from pie_async.metrics import EngineStats
from pie_async.runtime.virtual_time import VirtualTimeLoop
from pie_async.sampling_params import SamplingParams
from pie_async.testing import check_returned
from tests.support.ordering import (
    Conflicts,
    Dropped,
    Site,
    Trace,
    implied,
    is_racy,
    record,
    replay,
)
from tests.support.soak import BLOCK_BYTES

_STORY = r"(compute|h2d|d2h): (iteration|staging|write-back|demotion|promotion) .*"
BOTH_STORIES = (
    rf"{_STORY} (reads|writes) "
    r"(layer|ring buffer) \d+ of (device|staging|host) slot \d+, "
    rf"which {_STORY} (reads|writes), "
    r"and no event orders the two; .* "
    r"\((compute|h2d|d2h) from \d+\.\d{9} to .* s, (compute|h2d|d2h) from \d+\.\d{9} to .* s\)"
)
"""Who, where, who before, and the virtual times of both."""


class Pressure(NamedTuple):
    """More sequences than fit on the device, and fewer streamed blocks than they want."""

    sequences: int
    device_blocks: int
    host_blocks: int
    streamed_blocks: int


MODEST, HIGH = Pressure(5, 10, 30, 5), Pressure(8, 8, 60, 12)


def run(
    pressure: Pressure = MODEST,
    *,
    cancel_after: int | None = None,
    exchange: bool = False,
    follow: Callable[[Engine], Trace] | None = None,
) -> tuple[EngineStats, Trace | None]:
    """Run a workload.

    Args:
        cancel_after: every other request is cancelled after about so many outputs.
        exchange: what was staged is written back, which takes waits of its own.
        follow: called with the started engine.
    """

    async def ask(engine: Engine, number: int) -> None:
        await asyncio.sleep(number * 0.0005)
        prompt = [(100 * number + 7 * i) % 1000 for i in range(40 + 17 * number)]
        params = SamplingParams(
            max_tokens=40 + 11 * (number % 4), seed=1, ignore_eos=True, output_kind="delta"
        )
        outputs = 0
        stream = await engine.submit(prompt, params)
        async for _ in stream:
            outputs += 1
            if cancel_after is not None and number % 2 == 0 and outputs == cancel_after + number:
                stream.cancel()

    async def main() -> tuple[EngineStats, Trace | None]:
        engine = Engine(
            device="sim",
            model="tiny",
            debug=True,
            device_kv_bytes=pressure.device_blocks * BLOCK_BYTES,
            host_pool_bytes=pressure.host_blocks * BLOCK_BYTES,
            streamed_blocks=pressure.streamed_blocks,
            ring_depth=2,
            iterations_in_flight=2,
            exchange=exchange,
        )
        async with engine:
            trace = follow(engine) if follow else None
            async with asyncio.TaskGroup() as group:
                for number in range(pressure.sequences):
                    group.create_task(ask(engine, number))
            await engine.drain()
            check_returned(engine)
            return engine.stats(), trace

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())


@cache
def trace_of_a_run(*, exchange: bool = False) -> tuple[EngineStats, Trace]:
    stats, trace = run(exchange=exchange, follow=lambda engine: record(engine._loaded().device))
    assert trace is not None
    return stats, trace


def race_found(error: BaseException) -> UnorderedAccess | None:
    """The checker's report at the root of an engine's failure."""
    for leaf in _leaves(error):
        if isinstance(leaf, UnorderedAccess):
            return leaf
    return None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    yield error
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    if error.__cause__ is not None:
        yield from _leaves(error.__cause__)


def race_in(
    pressure: Pressure, cancel_after: int | None, *, exchange: bool = False
) -> UnorderedAccess | None:
    """What the checker stops a run for."""
    try:
        run(pressure, cancel_after=cancel_after, exchange=exchange)
    except (EngineStopped, ExceptionGroup) as stopped:
        race = race_found(stopped)
        if race is None:
            raise
        return race
    return None


def assert_caught(race: UnorderedAccess | None):
    """The checker stopped the engine, and told both stories."""
    assert race is not None, "nobody noticed"
    assert re.search(BOTH_STORIES, str(race)), race


# --- events on streams --------------------------------------------------------------------------


def wait_lines() -> list[int]:
    """Lines of the launcher that make a stream wait."""
    calls = (n for n in ast.walk(ast.parse(inspect.getsource(launcher))) if isinstance(n, ast.Call))
    return sorted(
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "wait"
    )


def test_the_run_streams_promotes_demotes_and_parks_and_reaches_every_wait():
    stats, trace = trace_of_a_run()
    assert stats.h2d_bytes > 0 < stats.demotions
    assert stats.promotions > 0 < stats.preemptions_parked
    _, exchanged = trace_of_a_run(exchange=True)
    reached = {site.line for each in (trace, exchanged) for site in each.waits()}
    assert reached == set(wait_lines())
    lines = {site.line for site in trace.waits()}
    assert len(trace.waits()) > len(lines), "one line waits at two times of an iteration"
    assert replay(trace) is None
    assert replay(exchanged) is None
    assert not is_racy(trace, Conflicts.of(trace), frozenset())


@pytest.mark.parametrize("line", wait_lines())
def test_without_the_waits_of_a_line_the_engine_is_stopped(line: int):
    is_reached = any(site.line == line for site in trace_of_a_run()[1].waits())
    dropped = Dropped(lambda site, _: site.line == line)
    with mock.patch.object(SimStream, "wait", _method(dropped)):
        assert_caught(race_in(MODEST, None, exchange=not is_reached))
    assert dropped.dropped > 0


@pytest.mark.parametrize("number", [0, 1, 50, -1])
def test_without_one_single_wait_the_engine_is_stopped(number: int):
    for site, waits in trace_of_a_run()[1].waits().items():
        dropped = Dropped(partial(_is, site, number % len(waits)))
        with mock.patch.object(SimStream, "wait", _method(dropped)):
            assert_caught(race_in(MODEST, None))
        assert dropped.dropped == 1


def _is(site: Site, number: int, where: Site, count: int) -> bool:
    return where == site and count == number


def _method(dropped: Dropped) -> Callable[..., None]:
    return lambda stream, event: dropped(stream, event)


def test_the_checker_notices_the_same_missing_waits_as_a_search_of_all_pairs():
    """The checker against the definition of a race, with each wait of the run gone in turn.

    A wait may be gone only if it said nothing new: its iteration was issued after the host had
    heard that the one before it was over.
    """
    _, trace = trace_of_a_run()
    conflicts = Conflicts.of(trace)
    may_be_gone = implied(trace)
    for site, numbers in trace.waits().items():
        needed = [n for n in numbers if is_racy(trace, conflicts, frozenset({n}))]
        assert set(numbers) - set(needed) <= may_be_gone, site
        assert len(needed) > 0.9 * len(numbers), site
        for number in {*numbers} - {*needed[1::4], *needed[2::4], *needed[3::4]}:
            race = replay(trace, frozenset({number}))
            assert (race is not None) == (number in needed), f"{site}: step {number}"


# --- what the host waits for ------------------------------------------------------------------


def test_both_notice_what_the_host_acted_on_without_having_heard_it():
    """Of iterations, copies out and copies in; that staging is over is of no consequence: the
    iteration it was for ends later."""
    _, trace = trace_of_a_run()
    conflicts = Conflicts.of(trace)
    noticed = set()
    for site, numbers in trace.waits("observe").items():
        for without in (frozenset(numbers), frozenset(numbers[:1]), frozenset(numbers[-1:])):
            is_noticed = is_racy(trace, conflicts, without)
            assert (replay(trace, without) is not None) == is_noticed, f"{site}: {without}"
            if is_noticed:
                noticed.add((site.stream, site.lines[0][0]))
    assert noticed == {("compute", "sample"), ("d2h", "issue"), ("h2d", "issue")}


def retire_at_once(pool_name: str) -> AbstractContextManager[object]:
    """Slots of this pool go back although issued iterations may touch them."""
    retire = ResidencyMap._retire

    def hasty(self, pool, slot):
        if pool.name == pool_name:
            pool.give_back(slot)
        else:
            retire(self, pool, slot)

    return mock.patch.object(ResidencyMap, "_retire", hasty)


def evict_at_once() -> AbstractContextManager[object]:
    """Cached blocks may go although issued iterations may read them."""
    keep = PrefixCache.keep
    return mock.patch.object(
        PrefixCache, "keep", lambda self, block, *, read_until: keep(self, block, read_until=None)
    )


def say_swapped_out_at_once() -> AbstractContextManager[object]:
    async def announce(self, mail, copied) -> None:
        blocks = tuple(move.block for move in mail.moves)
        self._scheduler.post(SwappedOut(blocks=blocks, swapped_bytes=0, busy_s=0.0))

    return mock.patch.object(SwapOutActor, "_announce", announce)


def say_swapped_in_at_once() -> AbstractContextManager[object]:
    async def announce(self, mail, copied) -> None:
        blocks = tuple(move.block for move in mail.moves)
        self._scheduler.post(SwappedIn(blocks=blocks, swapped_bytes=0, busy_s=0.0))

    return mock.patch.object(SwapInActor, "_announce_swapped_in", announce)


def seal_at_once() -> AbstractContextManager[object]:
    """Blocks count as sealed as soon as the iteration that fills them is issued."""
    launch = _Batch.launch

    def hasty(self, staged) -> None:
        launch(self, staged)
        for seq in self._sequences:
            known = min(seq.num_launched, len(seq.tokens))
            seq.num_settled = max(seq.num_settled, known)
            self._schedule._seal(seq)

    return mock.patch.object(_Batch, "launch", hasty)


MUTATIONS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "a device slot goes back while iterations may read it": lambda: retire_at_once("device"),
    "a host slot goes back while copies may read it": lambda: retire_at_once("host"),
    "a cached block goes while iterations may read it": evict_at_once,
    "a copy out counts before it is over": say_swapped_out_at_once,
    "a copy in counts before it is over": say_swapped_in_at_once,
    "a block is sealed before it is written": seal_at_once,
}


def races_of(mutation: Callable[[], AbstractContextManager[object]]) -> Iterator[UnorderedAccess]:
    """In runs whose clients cancel at many times: when a slot comes free is a matter of luck."""
    with mutation():
        for pressure in (MODEST, HIGH):
            for cancel_after in (1, 4, 16, 7, 10, 13, 19, 22, 25, 28, 31, 34, 37):
                race = race_in(pressure, cancel_after)
                if race is not None:
                    yield race


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_host_that_does_not_wait_is_caught(name: str):
    assert_caught(next(races_of(MUTATIONS[name]), None))


def test_nothing_is_reported_of_the_engine_as_it_is():
    assert not list(races_of(contextlib.nullcontext))


def test_a_staging_slot_may_go_back_at_once():
    """That it waits for iterations is needless: whoever writes a ring buffer next waits, on the
    stream, for the buffer's last reader."""
    assert not list(races_of(lambda: retire_at_once("staging")))
