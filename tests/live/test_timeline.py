"""Timelines read back from the story, of an engine on the simulated device."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest

from pie_async import Engine, EngineConfig, SamplingParams
from pie_async.config import MIB
from pie_async.ids import IterationId, SequenceId
from pie_async.live import view as view_module
from pie_async.live.chrome_trace import DEVICE, REQUESTS, chrome_trace
from pie_async.live.timeline import TRACKS, device_spans, request_spans, timeline
from pie_async.live.view import STATES, EngineView
from pie_async.messages import (
    Advance,
    IterationRan,
    Row,
    RunIteration,
    SampledToken,
    SequencesAdvanced,
    Submit,
)
from pie_async.sampling_params import SamplingParams as Params
from pie_async.story import Entry, Story

SMALL = EngineConfig(
    model="tiny",
    device="sim",
    device_kv_bytes=1 * MIB,
    host_pool_bytes=64 * MIB,
    streamed_blocks=60,
)


async def run(engine: Engine, requests: int = 12) -> None:
    async def one(number: int) -> None:
        params = SamplingParams(max_tokens=60, temperature=0.0, output_kind="final")
        async for _ in engine.generate([number] * 100, params, request_id=f"r{number}"):
            pass

    await asyncio.gather(*map(one, range(requests)))


async def test_spans_of_a_track_never_overlap_and_add_up_to_what_was_counted() -> None:
    async with Engine(SMALL) as engine:
        await run(engine)
        told, stats = await engine.timeline(last_iterations=10**6), engine.stats()
    assert told.iterations == stats.iterations > 50
    for track in TRACKS:
        spans = [span for span in told.spans if span.track == track]
        assert spans, track
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(spans)), track
    took_s = sum(span.end_s - span.start_s for span in told.spans if span.track == "compute")
    assert took_s == pytest.approx(stats.compute_s + stats.stall_s, rel=0.02)
    for track, counted in (("h2d", stats.h2d_bytes), ("d2h", stats.d2h_bytes)):
        assert sum(span.num_bytes for span in told.spans if span.track == track) == counted > 0
    tokens = sum(span.output_tokens for span in told.requests)
    assert tokens == stats.output_tokens == 12 * 60


async def test_the_last_iterations_alone_are_told() -> None:
    async with Engine(SMALL) as engine:
        await run(engine)
        told = await engine.timeline(last_iterations=5)
        nothing = await engine.timeline(last_iterations=0)
    assert told.iterations == 5
    assert len([span for span in told.spans if span.track == "compute"]) == 5
    start_s = min(span.start_s for span in told.spans if span.track == "compute")
    assert all(span.end_s > start_s for span in (*told.spans, *told.requests))
    assert nothing.spans == nothing.requests == ()


async def test_a_trace_has_one_track_for_each_stream_direction_and_sequence() -> None:
    async with Engine(SMALL) as engine:
        await run(engine, requests=6)
        trace = json.loads(chrome_trace(await engine.timeline(last_iterations=400)))
    events = trace["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {name.split(" ")[0] for name in names} == {"compute", "copies", "request"}
    assert len(names) == 4 + 6
    complete = [event for event in events if event["ph"] == "X"]
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in complete:
        assert event["ts"] >= 0 and event["dur"] >= 0
        tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["dur"]))
    assert {pid for pid, _ in tracks} == {DEVICE, REQUESTS}
    for spans in tracks.values():
        spans.sort()
        for (start, took), (following, _) in itertools.pairwise(spans):
            assert start + took <= following + 0.002  # a rounding of each
    assert {event["name"] for event in complete if event["pid"] == REQUESTS} >= {
        "queued",
        "prefill",
        "decode",
    }


def test_nothing_remembered_is_a_trace_too() -> None:
    empty = timeline(Story(lambda: 5.0), last_iterations=10, now_s=5.0)
    assert empty.iterations == 0
    assert all(event["ph"] == "M" for event in json.loads(chrome_trace(empty))["traceEvents"])


# --- by hand --------------------------------------------------------------------------------


def submitted(at_s: float, *sequences: int) -> Entry:
    command = Submit(
        request=1,
        sequences=tuple(map(SequenceId, sequences)),
        prompt_tokens=(1, 2, 3),
        sampling=Params(),
        seed=1,
        max_tokens=9,
    )
    return Entry(at_s, "scheduler", command)


def issued(at_s: float, number: int, *sequences: int, tokens: tuple[int, ...] = ()) -> Entry:
    rows = tuple(Row(SequenceId(each), each, 0, tokens, True) for each in sequences)
    return Entry(at_s, "compute", RunIteration(iteration=IterationId(number), rows=rows))


def ran(at_s: float, number: int, compute_s: float, stall_s: float = 0.0) -> Entry:
    fact = IterationRan(
        iteration=IterationId(number), sampled=(), compute_s=compute_s, stall_s=stall_s
    )
    return Entry(at_s, "scheduler", fact)


def advanced(at_s: float, number: int, *sequences: int, ends: bool = False) -> Entry:
    advances = tuple(
        Advance(SequenceId(each), SampledToken(SequenceId(each), 7), "length" if ends else None)
        for each in sequences
    )
    return Entry(
        at_s, "delivery", SequencesAdvanced(iteration=IterationId(number), advances=advances)
    )


def test_an_iteration_heard_of_late_begins_at_the_end_of_the_one_before() -> None:
    entries = [
        issued(0, 1, 1, tokens=(1, 2)),
        issued(0, 2, 1),
        ran(1, 1, 0.5, 0.25),
        ran(1.1, 2, 0.5),
    ]
    first, waited, second = device_spans(entries)
    assert (first.start_s, first.end_s, first.doing) == (0.25, 1, "prefill")
    assert (waited.track, waited.start_s, waited.end_s) == ("stall", 0.25, 0.5)
    assert (second.start_s, second.end_s, second.doing) == (1, 1.1, "decode")


def test_a_sequence_that_no_iteration_has_any_more_is_off_until_one_has() -> None:
    entries = [
        submitted(0, 1),
        issued(1, 1, 1, tokens=(1, 2, 3)),
        advanced(2, 1, 1),
        *(issued(3 + n, 2 + n, 9) for n in range(4)),
        issued(8, 6, 1),
        advanced(9, 6, 1, ends=True),
    ]
    phases = [
        (s.phase, s.start_s, s.end_s, s.output_tokens) for s in request_spans(entries, now_s=10)
    ]
    assert phases == [
        ("queued", 0, 1, 0),
        ("prefill", 1, 2, 0),
        ("decode", 2, 3, 1),
        ("off", 3, 8, 0),
        ("decode", 8, 9, 1),
    ]


def test_one_iteration_without_it_does_not_tear_a_phase_apart() -> None:
    entries = [submitted(0, 1), issued(1, 1, 1), issued(2, 2, 9), issued(3, 3, 1)]
    assert [s.phase for s in request_spans(entries, now_s=4)] == ["queued", "prefill"]


# --- looking --------------------------------------------------------------------------------


async def look_while_running(engine: Engine) -> list[EngineView]:
    running = asyncio.create_task(run(engine))
    views, since_s = [], 0.0
    while not running.done():
        await asyncio.sleep(1e-3)
        views.append(await engine.look(since_s=since_s))
        since_s = views[-1].now_s
    await running
    return views


async def test_what_a_look_shows_agrees_with_the_statistics() -> None:
    async with Engine(SMALL) as engine:
        views = await look_while_running(engine)
        idle = await engine.look()
    assert len(views) > 5
    for view in views:
        memory, stats = view.memory, view.stats
        assert set(memory.arena + memory.ring + memory.pool) <= STATES.keys()
        assert memory.arena_slots == stats.device_blocks
        # few enough slots that a cell is one
        assert len(memory.arena) == memory.arena_slots
        assert memory.arena.count("c") == stats.cached_blocks
        assert memory.ring.count("s") == stats.streamed_blocks or len(memory.ring) == 96
        assert {seq.name for seq in view.sequences} <= {f"r{n}" for n in range(12)}
        assert all(0 <= seq.pooled_share <= 1 for seq in view.sequences)
        assert bool(memory.staged_groups) <= bool(stats.streamed_blocks)
    assert any(view.memory.staged_groups for view in views)
    assert any("s" in view.memory.pool for view in views)
    ends = [span.end_s for view in views for span in view.spans]
    assert len(ends) > 50
    tracks = {(s.track, s.iteration, s.end_s) for view in views for s in view.spans}
    assert len(tracks) == len(ends), "a span was shown twice"
    assert idle.sequences == () and set(idle.memory.arena) <= {"c", "."}


async def test_an_engine_that_nobody_looks_at_makes_nothing(monkeypatch) -> None:
    monkeypatch.setattr("pie_async.actors.scheduler.memory_map", None)
    monkeypatch.setattr("pie_async.engine.recent_spans", None)
    async with Engine(SMALL) as engine:
        await run(engine, requests=2)
        with pytest.raises(TypeError):  # the stand-ins would have been noticed
            await engine.look()


async def test_of_very_many_blocks_some_are_looked_at(monkeypatch) -> None:
    placed = []
    real = view_module._place
    monkeypatch.setattr(view_module, "MOST_BLOCKS", 50)
    monkeypatch.setattr(
        view_module, "_place", lambda block, *rest: (placed.append(block), real(block, *rest))
    )
    config = EngineConfig(
        model="tiny", device="sim", device_kv_bytes=512 * MIB, host_pool_bytes=64 * MIB
    )
    async with Engine(config) as engine:
        jobs = [asyncio.create_task(run(engine, requests=40))]
        await asyncio.sleep(3e-3)
        view = await engine.look()
        await asyncio.gather(*jobs)
    assert view.stats.resident_blocks > 200
    assert 25 < len(placed) <= 50
    assert view.memory.arena_slots > 4000
    assert len(view.memory.arena) == 96
    in_cells = view.stats.resident_blocks * 96 / view.memory.arena_slots
    assert view.memory.arena.count("r") == pytest.approx(in_cells, abs=1)
    assert len(view.sequences) == 40
