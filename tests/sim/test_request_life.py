"""A request from submit to its end, and every way in which it can end early; engine on sim."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from pie_async.core.sequence import State
from pie_async.device.sim import SimStream
from pie_async.engine import Engine
from pie_async.errors import ContextTooLong, DeviceFault, EngineStopped, InvalidRequest, Overloaded
from pie_async.messages import SwapIn, SwapOut
from pie_async.sampling_params import SamplingParams
from pie_async.testing import check_returned
from tests.support.soak import BLOCK_BYTES, BLOCK_TOKENS


def small(device_blocks: int = 16, host_blocks: int = 64, **options) -> Engine:
    return Engine(
        **{
            "device": "sim",
            "model": "tiny",
            "debug": True,
            "device_kv_bytes": device_blocks * BLOCK_BYTES,
            "host_pool_bytes": host_blocks * BLOCK_BYTES,
            **options,
        }
    )


def asks(max_tokens: int, **params) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **{"output_kind": "delta", "seed": 1, **params})


async def tokens_of(stream) -> list[int]:
    return [t async for output in stream for out in output.outputs for t in out.token_ids]


async def alone(prompt: list[int], params: SamplingParams) -> list[int]:
    """What a request gives on an engine of its own with room for everything."""
    async with small(4000, 0) as engine:
        return await tokens_of(await engine.submit(prompt, params))


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + 7 * i) % 1000 for i in range(length)]


# --- larger than the device -------------------------------------------------------------------


@pytest.mark.parametrize("times", [4, 8])
@pytest.mark.parametrize("prompt_share", [0.1, 0.9])
async def test_a_sequence_many_times_larger_than_the_device_completes(times: int, prompt_share):
    device_blocks = 6
    total = times * device_blocks * BLOCK_TOKENS
    prompt_len = int(total * prompt_share)
    ask = asks(total - prompt_len)
    async with small(device_blocks, times * device_blocks) as engine:
        tokens = await tokens_of(await engine.submit(prompt(prompt_len), ask))
        stats = engine.stats()
        assert (stats.preemptions_parked, stats.preemptions_recomputed) == (0, 0)
        assert stats.demotions >= (times - 1) * device_blocks
        await engine.drain()
        check_returned(engine)
    assert tokens == await alone(prompt(prompt_len), ask)


async def test_with_pooling_off_preemption_recomputes_and_the_tokens_are_the_same():
    ask = asks(120)
    async with small(16, 0) as engine:
        streams = [await engine.submit(prompt(20, i), ask) for i in range(4)]
        found = await asyncio.gather(*map(tokens_of, streams))
        stats = engine.stats()
    assert stats.preemptions_recomputed > 0
    assert (stats.demotions, stats.h2d_bytes, stats.d2h_bytes) == (0, 0, 0)
    assert found == [await alone(prompt(20, i), ask) for i in range(4)]


async def test_nothing_is_copied_while_everything_fits():
    async with small(200, 64) as engine:
        streams = [await engine.submit(prompt(20, i), asks(50)) for i in range(5)]
        await asyncio.gather(*map(tokens_of, streams))
        stats = engine.stats()
    assert (stats.h2d_bytes, stats.d2h_bytes, stats.streamed_limit_blocks) == (0, 0, 0)
    assert stats.expansion_ratio == 1.0


async def test_a_thousand_requests_pass_through():
    async with small(512, 4096, debug=False, model="llama-3.1-8b", device_kv_bytes=2**30) as engine:
        streams = [
            await engine.submit(prompt(20 + i % 50, i), asks(8 + i % 24)) for i in range(1000)
        ]
        found = await asyncio.gather(*map(tokens_of, streams))
        assert [len(tokens) for tokens in found] == [8 + i % 24 for i in range(1000)]
        await engine.drain()
        check_returned(engine)


async def test_thousands_submitted_and_cancelled_in_one_turn_overfill_nothing():
    """Facts must find room in the scheduler's mailbox, however many commands there are."""
    async with small(64, 64, debug=False) as engine:
        streams = await asyncio.gather(
            *(engine.submit(prompt(5, i), asks(20)) for i in range(3000))
        )
        await asyncio.sleep(0.001)
        for stream in streams[10:]:
            stream.cancel()
        found = await asyncio.gather(*map(tokens_of, streams[:10]))
        assert [len(tokens) for tokens in found] == [20] * 10
        await engine.drain()
        assert engine.stats().sequences_finished == 3000


# --- several sequences, priorities ------------------------------------------------------------


async def test_four_sequences_of_one_prompt_share_its_blocks_and_differ():
    async with small(64) as engine:
        stream = await engine.submit(prompt(65), asks(6, n=4))
        got: dict[int, list[int]] = {}
        async for output in stream:
            for out in output.outputs:
                got.setdefault(out.index, []).extend(out.token_ids)
        stats = engine.stats()
    assert stats.cached_tokens == 3 * 64
    assert sorted(map(len, got.values())) == [6] * 4
    assert len({tuple(tokens) for tokens in got.values()}) == 4


async def test_lower_priority_numbers_are_served_first():
    order = []

    async def read(name: str, stream) -> None:
        await tokens_of(stream)
        order.append(name)

    async with small(max_running_sequences=1) as engine, asyncio.TaskGroup() as group:
        for name, priority in (("first", 5), ("late", 5), ("urgent", 0), ("early", 4)):
            stream = await engine.submit(prompt(10), asks(5), priority=priority)
            group.create_task(read(name, stream))
            if name == "first":
                await asyncio.sleep(0.0005)  # it runs already
    assert order == ["first", "urgent", "early", "late"]


# --- cancelling, at every stage ---------------------------------------------------------------


def state_of(engine: Engine, sequence: int) -> State | None:
    seq = engine._actors.scheduler._schedule.sequences.get(sequence)
    return None if seq is None else seq.state


async def reach(condition: Callable[[], bool]) -> None:
    for _ in range(200_000):
        if condition():
            return
        await asyncio.sleep(20e-6)
    raise AssertionError("that stage was never reached")


def is_queued(engine: Engine) -> bool:
    return state_of(engine, 3) is State.WAITING


def is_prefilling(engine: Engine) -> bool:
    seq = engine._actors.scheduler._schedule.sequences.get(3)
    return seq is not None and seq.state is State.RUNNING and 0 < seq.num_settled < seq.prompt_len


def is_decoding(engine: Engine) -> bool:
    seq = engine._actors.scheduler._schedule.sequences.get(3)
    return seq is not None and seq.state is State.RUNNING and seq.num_outputs > 3


def is_parked(engine: Engine) -> bool:
    return state_of(engine, 3) is State.PARKED


def is_resuming(engine: Engine) -> bool:
    return state_of(engine, 3) is State.RESUMING


def is_copied_out(engine: Engine) -> bool:
    seq = engine._actors.scheduler._schedule.sequences.get(3)
    return seq is not None and any(block.move == "out" for block in seq.table)


def is_copied_in(engine: Engine) -> bool:
    seq = engine._actors.scheduler._schedule.sequences.get(3)
    return seq is not None and any(block.move == "in" for block in seq.table)


STAGES = [
    is_queued,
    is_prefilling,
    is_decoding,
    is_parked,
    is_resuming,
    is_copied_out,
    is_copied_in,
]


@pytest.mark.parametrize("how", ["cancel", "close", "task"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
async def test_a_request_can_be_cancelled_at_any_stage(stage, how: str):
    async with small(14, 64, streamed_blocks=0, token_budget=32) as engine:
        others = [await engine.submit(prompt(40, i), asks(100)) for i in range(2)]
        reading = [asyncio.create_task(tokens_of(stream)) for stream in others]
        await asyncio.sleep(0.0002)
        victim = await engine.submit(prompt(60, 9), asks(80), request_id="victim")
        reader = asyncio.create_task(tokens_of(victim))
        await reach(lambda: stage(engine))
        if how == "cancel":
            assert await engine.cancel("victim")
            await reader
        else:
            reader.cancel()
            await asyncio.wait([reader])
            await victim.aclose()
        await reach(lambda: state_of(engine, 3) is None)
        assert await engine.cancel("victim") is False
        found = await asyncio.gather(*reading)
        await engine.drain()
        check_returned(engine)
        assert engine.stats().sequences_cancelled == 1
    assert found == [await alone(prompt(40, i), asks(100)) for i in range(2)]


async def test_leaving_the_loop_early_cancels_the_request():
    async with small() as engine:
        outputs = engine.generate(prompt(10), asks(10_00))
        async for _ in outputs:
            break
        await outputs.aclose()
        await engine.drain()
        stats = engine.stats()
    assert stats.sequences_cancelled == 1
    assert stats.output_tokens < 20


async def read_all(engine: Engine) -> None:
    async for _ in engine.generate(prompt(10), asks(1000)):
        pass


async def test_cancelling_the_readers_task_cancels_the_request():
    async with small() as engine:
        reader = asyncio.create_task(read_all(engine))
        await asyncio.sleep(0.001)
        reader.cancel()
        await asyncio.wait([reader])
        assert reader.cancelled()
        await engine.drain()
        assert engine.stats().sequences_cancelled == 1


async def test_a_timeout_around_the_loop_cancels_the_request():
    async with small() as engine:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read_all(engine), timeout=0.001)
        await engine.drain()
        assert engine.stats().sequences_cancelled == 1


# --- refusals -----------------------------------------------------------------------------------


async def test_a_full_queue_refuses_and_a_finished_request_makes_room():
    async with small(max_queued_requests=2) as engine:
        first = await engine.submit(prompt(5), asks(5))
        await engine.submit(prompt(5), asks(5))
        with pytest.raises(Overloaded, match="max_queued_requests") as refused:
            await engine.submit(prompt(5), asks(5))
        assert refused.value.retry_after_s > 0
        await tokens_of(first)
        assert len(await tokens_of(await engine.submit(prompt(5), asks(5)))) == 5


@pytest.mark.parametrize(
    ("ask", "kind", "param"),
    [
        (([], asks(5)), InvalidRequest, "prompt"),
        (("", asks(5)), InvalidRequest, "prompt"),
        (([1, 1024], asks(5)), InvalidRequest, "prompt"),
        (([1, -1], asks(5)), InvalidRequest, "prompt"),
        (([1, {"role": "user", "content": "x"}], asks(5)), InvalidRequest, "prompt"),
        (([1], asks(5, stop_token_ids=(1024,))), InvalidRequest, "stop_token_ids"),
        (([1] * 2000, asks(5)), ContextTooLong, "prompt"),
        (([1] * 1000, asks(500)), ContextTooLong, "max_tokens"),
        (("x" * 100_000, asks(5)), ContextTooLong, "prompt"),
    ],
)
async def test_a_request_that_cannot_run_is_refused_by_name_and_costs_nothing(ask, kind, param):
    async with small() as engine:
        with pytest.raises(kind) as refused:
            await engine.submit(*ask)
        assert refused.value.param == param
        assert engine.stats().waiting == 0
        await engine.drain()


async def test_a_request_id_is_unique_while_it_is_in_use():
    async with small() as engine:
        stream = await engine.submit(prompt(5), asks(5), request_id="mine")
        with pytest.raises(InvalidRequest, match="mine") as refused:
            await engine.submit(prompt(5), asks(5), request_id="mine")
        assert refused.value.param == "request_id"
        await tokens_of(stream)
        await tokens_of(await engine.submit(prompt(5), asks(5), request_id="mine"))


async def test_without_max_tokens_a_request_runs_to_the_contexts_end():
    async with small(8, 8) as engine:
        tokens = await tokens_of(await engine.submit(prompt(5), asks(None)))
        assert len(tokens) == engine.model.max_model_len - 5


# --- ends of the engine -------------------------------------------------------------------------


async def test_draining_finishes_what_is_accepted_and_accepts_no_more():
    async with small() as engine:
        stream = await engine.submit(prompt(5), asks(30))
        draining = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        assert (engine.is_running, engine.is_accepting) == (True, False)
        with pytest.raises(EngineStopped, match="draining"):
            await engine.submit(prompt(5), asks(5))
        assert len(await tokens_of(stream)) == 30
        await draining
        await engine.drain()  # again: nothing to wait for


async def test_closing_cancels_open_streams():
    engine = small()
    await engine.start()
    stream = await engine.submit(prompt(5), asks(1000))
    reading = asyncio.create_task(tokens_of(stream))
    await asyncio.sleep(0.001)
    await engine.aclose()
    assert 0 < len(await reading) < 1000
    assert (engine.is_running, engine.is_accepting) == (False, False)
    with pytest.raises(EngineStopped):
        await engine.submit(prompt(5), asks(5))
    await engine.aclose()


async def test_closing_with_a_grace_period_lets_requests_finish_within_it():
    engine = small()
    await engine.start()
    short = asyncio.create_task(tokens_of(await engine.submit(prompt(5), asks(20))))
    endless = asyncio.create_task(tokens_of(await engine.submit(prompt(5), asks(1100))))
    began_s = asyncio.get_running_loop().time()
    await engine.aclose(drain_s=0.01)
    assert asyncio.get_running_loop().time() - began_s == pytest.approx(0.01, rel=0.2)
    assert len(await short) == 20
    assert len(await endless) < 1100


async def test_closing_while_copies_are_under_way_waits_for_them():
    engine = small(14, 64, streamed_blocks=0)
    await engine.start()
    engine.story.keep_all()
    for i in range(3):
        await engine.submit(prompt(40, i), asks(100))
    await reach(lambda: engine._actors.scheduler._schedule.has_moves)
    await engine.aclose()
    kinds = [type(entry.message) for entry in engine.story]
    assert SwapOut in kinds or SwapIn in kinds
    assert engine.stats().resident_blocks == engine.stats().pooled_blocks == 0


async def test_an_engine_that_never_started_can_be_closed_but_not_used():
    engine = small()
    await engine.aclose()
    assert not engine.is_running
    with pytest.raises(EngineStopped, match="not running"):
        await engine.submit(prompt(5), asks(5))
    with pytest.raises(EngineStopped, match="not started"):
        engine.stats()


async def test_an_engine_starts_once():
    async with small() as engine:
        with pytest.raises(EngineStopped, match="starts once"):
            await engine.start()


@pytest.mark.parametrize("where", ["run_layers", "stage", "demote", "sample"])
async def test_a_device_that_fails_fails_every_stream_and_stops_the_engine(where, monkeypatch):
    engine = small(14, 64)
    await engine.start()
    device, calls = engine._parts.device, 0
    real = getattr(device, where)

    def fail_later(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > 20:
            raise DeviceFault("the link is gone")
        return real(*args, **kwargs)

    if where == "demote":
        calls = 20
    monkeypatch.setattr(device, where, fail_later)
    streams = [await engine.submit(prompt(40, i), asks(200)) for i in range(4)]
    results = await asyncio.gather(*map(tokens_of, streams), return_exceptions=True)
    assert all(isinstance(result, EngineStopped) for result in results), results
    assert all("DeviceFault: the link is gone" in str(result) for result in results)
    assert (engine.is_running, engine.is_accepting) == (False, False)
    with pytest.raises(EngineStopped, match="the link is gone"):
        await engine.submit(prompt(5), asks(5))
    await engine.aclose()


async def test_work_that_fails_on_its_stream_stops_the_engine_as_well():
    engine = small()
    await engine.start()
    device = engine._parts.device
    assert isinstance(device.compute, SimStream)
    stream = await engine.submit(prompt(5), asks(500))
    reading = asyncio.create_task(tokens_of(stream))
    await asyncio.sleep(0.001)
    device.fail(device.compute, DeviceFault("an uncorrectable error"))
    with pytest.raises(EngineStopped, match="uncorrectable"):
        await reading
    await engine.aclose()
    assert not engine.is_running


async def test_draining_an_engine_that_fails_says_so():
    engine = small()
    await engine.start()
    await engine.submit(prompt(5), asks(500))
    draining = asyncio.create_task(engine.drain())
    await asyncio.sleep(0.001)
    device = engine._parts.device
    device.fail(device.compute, DeviceFault("gone"))
    with pytest.raises(EngineStopped, match="gone"):
        await draining
    with pytest.raises(EngineStopped, match="gone"):
        await engine.drain()
    await engine.aclose()


async def test_closing_gracefully_an_engine_that_fails_meanwhile_still_closes_it():
    engine = small()
    await engine.start()
    await engine.submit(prompt(5), asks(500))
    closing = asyncio.create_task(engine.aclose(drain_s=10.0))
    await asyncio.sleep(0.001)
    device = engine._parts.device
    device.fail(device.compute, DeviceFault("gone"))
    await closing
    assert not engine.is_running


async def test_draining_an_engine_that_has_failed_says_so():
    engine = small()
    await engine.start()
    reading = asyncio.create_task(tokens_of(await engine.submit(prompt(5), asks(500))))
    await asyncio.sleep(0.001)
    device = engine._parts.device
    device.fail(device.compute, DeviceFault("gone"))
    with pytest.raises(EngineStopped):
        await reading
    with pytest.raises(EngineStopped, match="gone"):
        await engine.drain()
    await engine.aclose()


async def test_a_cancelled_close_is_cancelled_and_the_engine_can_still_be_closed():
    engine = small()
    await engine.start()
    await engine.submit(prompt(5), asks(1000))
    closing = asyncio.create_task(engine.aclose(drain_s=1000.0))
    await asyncio.sleep(0.001)
    closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled()
    await engine.aclose()
    assert not engine.is_running


async def test_two_engines_in_one_process_do_not_meet():
    async with small() as one, small() as two:
        first, second = await asyncio.gather(
            tokens_of(await one.submit(prompt(20), asks(20), request_id="x")),
            tokens_of(await two.submit(prompt(20), asks(20), request_id="x")),
        )
        assert first == second
        assert one.stats().output_tokens == two.stats().output_tokens == 20


@pytest.mark.parametrize(
    "wrong", [5, b"text", [{"role": "user"}], [{"content": "Hi"}], [{"role": "user", "content": 3}]]
)
async def test_what_is_no_prompt_is_refused_and_the_engine_goes_on(wrong):
    async with small() as engine:
        with pytest.raises(InvalidRequest):
            await engine.submit(wrong, asks(3))
        assert len(await tokens_of(await engine.submit("Hi", asks(3)))) == 3


async def test_a_priority_that_is_no_number_is_refused():
    async with small() as engine:
        with pytest.raises(InvalidRequest) as refused:
            await engine.submit("Hi", asks(3), priority="high")
        assert refused.value.param == "priority"


async def test_a_submission_overtaken_by_the_end_raises_engine_stopped():
    async with small() as engine:
        engine._actors.scheduler.mailbox.close()  # as the supervisor does when an actor fails
        with pytest.raises(EngineStopped):
            await engine.submit("Hi", asks(3))
        assert not engine._streams
