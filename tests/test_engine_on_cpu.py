"""The whole engine with the built-in model and real tensors: pooling never shows in the output."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import threading
import time
import weakref

import pytest
import torch
import uvloop

from pie_async import LLM, Engine, SamplingParams
from pie_async.device.cpu import CpuDevice, CpuStream
from pie_async.device.launcher import Launcher
from pie_async.device.protocol import PassResult
from pie_async.errors import DeviceFault, EngineStopped
from pie_async.messages import (
    BlockMove,
    CopyRun,
    LaneBinding,
    Row,
    RunIteration,
    StageIteration,
    TableUpdate,
)
from pie_async.metrics import EngineStats
from pie_async.model.runner import ModelRunner
from tests.support.cpu_rig import random_decoder
from tests.support.device_rigs import LAYOUT

BLOCK_BYTES = 96 * 1024
"""Of the built-in model in float32: 16 tokens, 6 layers."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=0)

pytestmark = pytest.mark.realtime


def options(device_blocks: int = 400, host_blocks: int = 400, **more) -> dict:
    return {
        "device_kv_bytes": device_blocks * BLOCK_BYTES,
        "host_pool_bytes": host_blocks * BLOCK_BYTES,
        "cpu_threads": 1,
        **more,
    }


def prompt(number: int, length: int) -> list[int]:
    return [10 + (number * 131 + i * 17) % 4000 for i in range(length)]


PROMPTS = [prompt(number, 24 + 9 * number) for number in range(6)]


def generate(params: SamplingParams = GREEDY, prompts=PROMPTS, **how):
    """Token ids of each prompt, and the engine's stats."""
    with LLM(**options(**how)) as llm:
        outputs = llm.generate(prompts, params, progress=False)
        return [output.outputs[0].token_ids for output in outputs], llm.stats()


# --- the same output, whatever the memory -----------------------------------------------------


@pytest.fixture(scope="module")
def roomy() -> list[tuple[int, ...]]:
    tokens, stats = generate(host_blocks=0)
    assert stats.preemptions_recomputed == 0
    return tokens


@pytest.mark.parametrize(
    "how",
    [
        {"streamed_blocks": 100},
        {"streamed_blocks": 100, "debug": True},
        {"streamed_blocks": 100, "iterations_in_flight": 1, "layer_group": 2, "ring_depth": 2},
        {"streamed_blocks": 100, "exchange": True},
        {"streamed_blocks": 0, "debug": True},
        {"host_blocks": 0},
    ],
    ids=[
        "streamed",
        "streamed-poisoned",
        "streamed-in-groups",
        "exchanged",
        "parked",
        "recomputed",
    ],
)
def test_with_a_quarter_of_the_memory_the_tokens_are_the_same(roomy, how: dict):
    need = sum(math.ceil((len(p) + GREEDY.max_tokens) / 16) for p in PROMPTS)
    without_pool = how.get("host_blocks") == 0
    longest = 11  # blocks of one sequence and its spares: less could never run it
    tokens, stats = generate(device_blocks=longest if without_pool else need // 4, **how)
    assert tokens == roomy
    if how.get("streamed_blocks"):
        assert stats.h2d_bytes > 100 * BLOCK_BYTES, "it did not stream"
        copied_out = stats.demotions * BLOCK_BYTES
        assert (stats.d2h_bytes > 2 * copied_out) == bool(how.get("exchange"))
    assert (stats.preemptions_recomputed > 0) == without_pool
    assert (stats.resident_blocks, stats.pooled_blocks) == (0, 0)


@pytest.mark.parametrize("link_bytes_per_s", [None, 200e6])
def test_a_sequence_four_times_larger_than_the_arena_gives_the_same_tokens(link_bytes_per_s):
    one = [prompt(3, 280)]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    expected, _ = generate(params, one, host_blocks=0)
    tokens, stats = generate(
        params, one, device_blocks=5, host_blocks=30, debug=True, link_bytes_per_s=link_bytes_per_s
    )
    assert tokens == expected
    assert (stats.preemptions_parked, stats.preemptions_recomputed) == (0, 0)
    assert stats.demotions >= 15


def test_sampled_tokens_are_the_same_too():
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, seed=i, max_tokens=30, repetition_penalty=1.1)
        for i in range(6)
    ]
    expected, _ = generate(params)
    tokens, stats = generate(params, device_blocks=8, streamed_blocks=60)
    assert tokens == expected
    assert stats.h2d_bytes > 0


# --- prefixes that are found ------------------------------------------------------------------


def converse(turns: int = 4, **how) -> tuple[list[tuple[int, ...]], list[int], EngineStats]:
    """Two conversations that begin alike; outputs, tokens found by each, and the stats."""
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    talks = [prompt(1, 60), [*prompt(1, 40), *prompt(2, 25)]]
    tokens, found = [], []
    with LLM(**options(**how)) as llm:
        for turn in range(turns):
            for talk in talks:
                (output,) = llm.generate(talk, params, progress=False)
                tokens.append(output.outputs[0].token_ids)
                found.append(output.num_cached_tokens)
                talk += [*tokens[-1], *prompt(turn + 7, 9)]
        return tokens, found, llm.stats()


def test_every_turn_of_a_conversation_finds_the_ones_before_it():
    expected, none, stats = converse(prefix_caching=False)
    assert set(none) == {0}
    assert (stats.cached_blocks, stats.prefix_query_tokens) == (0, 0)
    tokens, found, stats = converse(debug=True)
    assert tokens == expected
    # Prompts of 60 and 65 tokens, the first 40 the same; each turn adds 40 + 9, of which the
    # last output token has no KV.
    assert found == [0, 32, 96, 96, 144, 144, 192, 192]
    assert stats.cached_tokens == stats.prefix_hit_tokens == sum(found)
    assert stats.resident_blocks == stats.cache_evictions == 0
    assert stats.cached_blocks > 20


def test_on_a_device_that_holds_one_conversation_the_tokens_are_the_same():
    expected, _, _ = converse(prefix_caching=False)
    for how in ({"host_blocks": 0}, {"streamed_blocks": 20}):
        tokens, found, stats = converse(device_blocks=20, debug=True, **how)
        assert tokens == expected
        assert sum(found) > 0
        assert stats.cache_evictions > 0
        assert stats.preemptions_parked == stats.preemptions_recomputed == 0


def test_tenants_find_only_their_own_prefixes():
    with LLM(**options()) as llm:

        def found(salt: str | None) -> int:
            (output,) = llm.generate(prompt(1, 60), GREEDY, progress=False, cache_salt=salt)
            return output.num_cached_tokens

        assert [found(salt) for salt in (None, "a", "b", "a", "b", None)] == [0, 0, 0, 48, 48, 48]


# --- bit for bit ------------------------------------------------------------------------------


class Lockstep:
    """A CPU device driven by hand through the launcher; keeps the logits of every iteration."""

    LENGTHS = (13, 22, 31)
    STREAMED = 3  # of each sequence's blocks, the oldest

    def __init__(self, tmp_path, *, is_pooled: bool, link_bytes_per_s: float | None = None) -> None:
        self.device = CpuDevice(
            LAYOUT,
            device_slots=40,
            host_slots=16,
            dtype=torch.float32,
            link_bytes_per_s=link_bytes_per_s,
            poisons=True,
        )
        runner = ModelRunner(
            random_decoder(tmp_path),
            self.device.arena.layers,
            lanes=4,
            max_blocks=16,
            block_tokens=LAYOUT.block_tokens,
        )
        self.device.load(runner)
        self.logits: list[torch.Tensor] = []
        sample = runner._lanes.sampler.sample

        def keep_and_sample(logits, *args):
            self.logits.append(logits.clone())
            return sample(logits, *args)

        runner._lanes.sampler.sample = keep_and_sample
        self._is_pooled = is_pooled

    async def run(self, iterations: int = 12) -> list[list[int]]:
        """Prefill three prompts together, then decode; pooled, all but the tails are streamed."""
        self.device.start(asyncio.get_running_loop())
        launcher = Launcher(self.device, asyncio.get_running_loop())
        lanes = range(len(self.LENGTHS))
        slots = [list(range(12 * lane, 12 * lane + 12)) for lane in lanes]
        greedy = SamplingParams(temperature=0.0)
        await launcher.run(
            RunIteration(
                iteration=0,
                rows=tuple(
                    Row(lane, lane, 0, tuple((lane * 7 + i * 3) % 60 for i in range(length)), True)
                    for lane, length in enumerate(self.LENGTHS)
                ),
                bindings=tuple(
                    LaneBinding(
                        lane=lane,
                        sequence=lane,
                        sampling=greedy,
                        seed=lane,
                        stop_ids=(),
                        prompt_len=n,
                    )
                    for lane, n in enumerate(self.LENGTHS)
                ),
                tables=tuple(TableUpdate(lane, 0, tuple(slots[lane])) for lane in lanes),
            )
        )
        tables, runs = await self._pool(launcher, slots) if self._is_pooled else ((), ())
        flying = []
        for number in range(1, iterations + 1):
            rows = tuple(Row(n, n, self.LENGTHS[n] + number - 1, (), True) for n in lanes)
            flying.append(
                launcher.run(
                    RunIteration(
                        iteration=number, rows=rows, tables=tables, is_staged=self._is_pooled
                    )
                )
            )
            if self._is_pooled:
                flying.append(launcher.stage(StageIteration(iteration=number, runs=runs)))
            tables = ()
        ended = [await one for one in flying]
        await self.device.drain()
        self.device.close()
        passes = [result for result in ended if isinstance(result, PassResult)]
        return [[token.token for token in result.sampled] for result in passes]

    async def _pool(self, launcher: Launcher, slots: list[list[int]]):
        """Demote the oldest blocks of each lane, and ruin what they leave behind."""
        pairs = [(lane, block) for lane in range(3) for block in range(self.STREAMED)]
        moves = [BlockMove(i, slots[lane][b], i) for i, (lane, b) in enumerate(pairs)]
        await launcher.demote(moves)
        for layer in self.device.arena.layers:
            for move in moves:
                layer[move.device_slot].fill_(float("nan"))
        first = self.device.memory.first_staging_slot
        tables = tuple(
            TableUpdate(lane, 0, tuple(range(first + lane * 3, first + lane * 3 + 3)))
            for lane in range(3)
        )
        return tables, (CopyRun(0, first, len(moves)),)


@pytest.mark.parametrize("link_bytes_per_s", [None, 3e6])
async def test_streamed_logits_equal_resident_ones_bit_for_bit(tmp_path, link_bytes_per_s):
    resident = Lockstep(tmp_path, is_pooled=False)
    pooled = Lockstep(tmp_path, is_pooled=True, link_bytes_per_s=link_bytes_per_s)
    assert await pooled.run() == await resident.run()
    assert len(pooled.logits) == len(resident.logits) == 13
    for mine, theirs in zip(pooled.logits, resident.logits, strict=True):
        assert mine.numpy().tobytes() == theirs.numpy().tobytes()


@pytest.mark.parametrize(
    ("forgetful", "link_bytes_per_s"),
    [("h2d", None), ("compute", 3e6)],
    ids=["staging does not wait for the ring", "compute does not wait for staging"],
)
async def test_without_its_waits_the_output_is_wrong(
    tmp_path, monkeypatch: pytest.MonkeyPatch, forgetful: str, link_bytes_per_s
):
    """Otherwise the tests above would prove nothing."""
    expected = Lockstep(tmp_path, is_pooled=False)
    await expected.run()
    real = CpuStream.wait
    monkeypatch.setattr(
        CpuStream,
        "wait",
        lambda stream, event: None if stream.name == forgetful else real(stream, event),
    )
    broken = Lockstep(tmp_path, is_pooled=True, link_bytes_per_s=link_bytes_per_s)
    try:
        await broken.run()
    except DeviceFault:
        return  # the sampler met NaN
    pairs = zip(broken.logits, expected.logits, strict=True)
    assert any(not torch.equal(mine, theirs) for mine, theirs in pairs)


# --- a good guest -----------------------------------------------------------------------------


async def read(engine: Engine, tokens: list[int], max_tokens: int = 20) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    async for output in engine.generate(tokens, params):
        last = output
    return list(last.outputs[0].token_ids)


async def test_the_callers_loop_is_never_blocked_for_long():
    gaps: list[float] = []

    async def beat() -> None:
        while True:
            began_s = time.perf_counter()
            await asyncio.sleep(0.002)
            gaps.append(time.perf_counter() - began_s - 0.002)

    async with Engine(**options(device_blocks=700, token_budget=4096)) as engine:
        heart = asyncio.create_task(beat())
        await asyncio.gather(*(read(engine, prompt(i, 500), 30) for i in range(16)))
        heart.cancel()
        stats = engine.stats()
    gaps.sort()
    median_s, p99_s = gaps[len(gaps) // 2], gaps[len(gaps) * 99 // 100]
    assert stats.compute_s > 0.5, "too little work to block anything"
    assert median_s < 0.010
    assert p99_s < 0.050


def pie_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("pie-")}


def only(before: set[threading.Thread]) -> bool:
    """Whether no other threads are left, soon: the watchdog's ends by itself."""
    for thread in pie_threads() - before:
        thread.join(timeout=10)
    return pie_threads() <= before


async def test_closing_leaves_no_thread_behind():
    before = pie_threads()
    async with Engine(**options()) as engine:
        await read(engine, prompt(1, 20))
        assert pie_threads() - before
    assert only(before)


def test_closing_the_synchronous_interface_leaves_no_thread_behind():
    before = pie_threads()
    with LLM(**options()) as llm:
        llm.generate([prompt(1, 20)], GREEDY, progress=False)
    assert only(before)


async def test_two_engines_live_side_by_side():
    async with Engine(**options()) as one, Engine(**options(device_blocks=5)) as two:
        first, second = await asyncio.gather(read(one, prompt(1, 90)), read(two, prompt(1, 90)))
        assert first == second


async def test_the_synchronous_interface_works_inside_a_running_loop():
    assert asyncio.get_running_loop().is_running()
    with LLM(**options()) as llm:
        (output,) = llm.generate([prompt(1, 20)], GREEDY, progress=False)
    assert len(output.outputs[0].token_ids) == GREEDY.max_tokens


@pytest.mark.parametrize("is_main", [True, False], ids=["main thread", "other thread"])
@pytest.mark.parametrize("loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop])
def test_it_runs_on_any_loop_and_thread(loop, is_main: bool):
    found: list[list[int]] = []

    async def main() -> None:
        async with Engine(**options()) as engine:
            found.append(await read(engine, prompt(1, 20)))

    def run() -> None:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(main())

    if is_main:
        run()
    else:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert [len(tokens) for tokens in found] == [20]


async def test_a_model_that_raises_fails_the_streams_and_stops_the_engine(monkeypatch):
    async with Engine(**options()) as engine:
        runner = engine._parts.device._model
        layers, calls = runner.run_layers, itertools.count()

        def fail_later(*args, **kwargs):
            if next(calls) > 12:
                raise RuntimeError("out of memory")
            return layers(*args, **kwargs)

        monkeypatch.setattr(runner, "run_layers", fail_later)
        results = await asyncio.gather(
            *(read(engine, prompt(i, 20), 200) for i in range(3)), return_exceptions=True
        )
        assert all(isinstance(result, EngineStopped) for result in results)
        assert "out of memory" in str(results[0])
        assert not engine.is_running


async def test_a_closed_engine_that_is_kept_holds_no_memory():
    engine = Engine(device_kv_bytes=8 * 2**20, host_pool_bytes=8 * 2**20)
    async with engine:
        arena = weakref.ref(engine._parts.device.arena.layers[0])
        runner = weakref.ref(engine._parts.device._runner)
    gc.collect()
    assert arena() is None
    assert runner() is None
    assert engine.model.vocab_size > 0
