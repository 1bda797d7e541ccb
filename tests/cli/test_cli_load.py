"""Loads on a scripted engine and on a server in front of it."""

import asyncio
import time

import pytest
from aiohttp.test_utils import TestServer

from pie_async.api.app import create_app
from pie_async.api.client import CompletionsClient, ServerError
from pie_async.cli.load import EngineTarget, PoolWatch, Prompts, put_load
from pie_async.errors import Overloaded
from pie_async.metrics import EngineStats
from pie_async.workload import WorkItem
from tests.support.fake_engine import FakeEngine

PROMPTS = Prompts(vocab_size=90, first_token=65)
ITEMS = [WorkItem(prompt_tokens=8, output_tokens=5)] * 4


def clock():
    return asyncio.get_running_loop().time()


async def test_every_request_is_sent_with_its_lengths_and_measured():
    engine = FakeEngine(reply="abcdefgh")
    run = await put_load(EngineTarget(engine), ITEMS, PROMPTS, clock=clock)
    assert [len(submission.prompt) for submission in engine.submissions] == [8] * 4
    assert all(s.params.ignore_eos and s.params.max_tokens == 5 for s in engine.submissions)
    assert [request.output_tokens for request in run.requests] == [5] * 4
    assert all(request.is_complete for request in run.requests)


async def test_requests_arrive_at_their_times():
    items = [WorkItem(arrival_s=at, prompt_tokens=3, output_tokens=2) for at in (0.0, 7.5)]
    run = await put_load(EngineTarget(FakeEngine()), items, PROMPTS, clock=clock)
    first, second = run.requests
    assert second.submitted_s - first.submitted_s == pytest.approx(7.5)
    assert run.duration_s >= 7.5


async def test_no_more_requests_are_open_than_allowed():
    engine = FakeEngine()
    peak = 0

    class Counting(EngineTarget):
        async def stream(self, prompt, *, output_tokens):
            nonlocal peak
            async for num_tokens in super().stream(prompt, output_tokens=output_tokens):
                peak = max(peak, len(engine.open_ids))
                yield num_tokens

    await put_load(Counting(engine), ITEMS * 5, PROMPTS, concurrency=3, clock=clock)
    assert len(engine.submissions) == 20
    assert peak == 3


async def test_a_refused_request_is_counted_and_the_others_go_on():
    engine = FakeEngine(refusal=Overloaded("too much is queued"), refuse_after=3)
    run = await put_load(EngineTarget(engine), ITEMS, PROMPTS, clock=clock)
    assert [request.error for request in run.requests].count("too much is queued") == 1
    assert sum(request.is_complete for request in run.requests) == 3


async def test_a_cancelled_run_cancels_its_requests():
    engine = FakeEngine(hold_at=1)
    run = asyncio.ensure_future(put_load(EngineTarget(engine), ITEMS, PROMPTS, clock=clock))
    await engine.holding.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert not engine.open_ids


async def test_pool_counters_are_differences_and_peaks_of_the_run():
    engine = FakeEngine(snapshot=EngineStats(compute_s=5.0, stall_s=1.0, demotions=7))
    watch = PoolWatch(engine, clock)
    async with watch.watching():
        await asyncio.sleep(1.0)
        engine.snapshot = EngineStats(compute_s=5.5, streamed_blocks=9, stall_s=1.0, demotions=8)
        await asyncio.sleep(1.0)
        engine.snapshot = EngineStats(compute_s=8.0, stall_s=2.0, demotions=10)
    pool = watch.summary(started_s=0.0, most_samples=10)
    assert pool.streamed_blocks_peak == 9
    assert pool.demotions == 3
    assert pool.stall_share == pytest.approx(0.25)
    assert len(pool.timeline) <= 10


@pytest.fixture
async def server():
    """(engine, server): OpenAI's API over a scripted engine."""
    engine = FakeEngine(reply="abcdefgh")
    async with TestServer(create_app(engine, api_keys=["secret"])) as served:
        yield engine, served


@pytest.mark.realtime
async def test_a_server_is_loaded_over_http_and_its_tokens_are_counted(server):
    engine, served = server
    async with CompletionsClient(str(served.make_url("/")), api_key="secret") as client:
        assert client.model == "fake-model"
        run = await put_load(client, ITEMS, PROMPTS, clock=time.perf_counter)
    assert [request.error for request in run.requests] == [None] * 4
    assert [request.output_tokens for request in run.requests] == [5] * 4
    assert {len(submission.prompt) for submission in engine.submissions} == {8}


@pytest.mark.realtime
async def test_a_servers_refusals_and_failures_are_told_in_its_words(server):
    engine, served = server
    url = str(served.make_url("/v1"))
    with pytest.raises(ServerError, match="401"):
        await CompletionsClient(url).__aenter__()
    with pytest.raises(ServerError, match="no model 'other'"):
        await CompletionsClient(url, api_key="secret", model="other").__aenter__()
    engine.fail_at = 2
    async with CompletionsClient(url, api_key="secret") as client:
        run = await put_load(client, ITEMS[:1], PROMPTS)
    assert "the server ended the answer" in run.requests[0].error


@pytest.mark.realtime
async def test_an_address_where_nobody_answers_is_named():
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9"):
        await CompletionsClient("http://127.0.0.1:9").__aenter__()
