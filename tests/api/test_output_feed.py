"""Merging streams, on virtual time."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from pie_async.errors import EngineStopped
from pie_async.ids import SequenceId
from pie_async.messages import Advance, SampledToken
from pie_async.openai.feed import MOST_WAITING, Arrival, OutputFeed
from pie_async.openai.latency import RequestLatency
from pie_async.outputs import CompletionOutput, FinishReason, OutputShortcut, RequestOutput
from pie_async.request_stream import RequestStream
from pie_async.sampling_params import SamplingParams
from tests.support.fake_engine import FakeEngine
from tests.support.request_streams import a_stream

DELTA = SamplingParams(output_kind="delta", max_tokens=None)


async def open_feed(engine: FakeEngine, prompts: int = 1) -> OutputFeed:
    return OutputFeed([await engine.submit("p", DELTA) for _ in range(prompts)])


async def drain(feed: OutputFeed) -> list[str]:
    texts: dict[int, str] = {}
    while (arrivals := await feed.next_arrivals(silence_s=60)) is not None:
        for arrival in arrivals:
            text = arrival.output.outputs[0].text
            texts[arrival.prompt_index] = texts.get(arrival.prompt_index, "") + text
    return [texts[index] for index in sorted(texts)]


async def test_feed_returns_everything_of_every_stream_and_then_none() -> None:
    feed = await open_feed(FakeEngine(reply="abc"), prompts=3)
    assert await drain(feed) == ["abc"] * 3
    assert await feed.next_arrivals(silence_s=60) is None
    await feed.aclose()


async def test_silence_is_an_empty_list_after_exactly_that_long() -> None:
    feed = await open_feed(FakeEngine(hold_at=0))
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    assert await feed.next_arrivals(silence_s=7.5) == []
    assert loop.time() - started_s == pytest.approx(7.5)
    await feed.aclose()


async def test_what_waits_for_a_client_is_bounded_and_the_rest_comes_when_it_reads_on() -> None:
    text = "".join(map(chr, range(65, 165)))
    engine = FakeEngine(reply=text)
    feed = await open_feed(engine, prompts=2)
    await asyncio.sleep(1)
    arrivals = await feed.next_arrivals(silence_s=60)
    assert arrivals is not None and len(arrivals) <= MOST_WAITING + 1
    first = ["".join(a.output.outputs[0].text for a in arrivals if a.prompt_index == i)
             for i in range(2)]  # fmt: skip
    rest = await drain(feed)
    assert [start + end for start, end in zip(first, rest, strict=True)] == [text, text]
    await feed.aclose()


async def test_the_end_of_one_stream_is_no_silence_of_the_others() -> None:
    first, second = FakeEngine(reply="a"), FakeEngine(reply="b", hold_at=0)
    feed = OutputFeed([await engine.submit("p", DELTA) for engine in (first, second)])
    assert await feed.next_arrivals(silence_s=60)
    asyncio.get_running_loop().call_later(5, second.gate.set)
    assert [arrival.output.outputs[0].text for arrival in await feed.next_arrivals(silence_s=60)]
    await feed.aclose()


async def test_what_came_before_a_failure_is_returned_before_it_is_raised() -> None:
    feed = await open_feed(FakeEngine(reply="abc", fail_at=2))
    await asyncio.sleep(1)  # the stream has failed by now
    arrivals = await feed.next_arrivals(silence_s=60)
    assert [arrival.output.outputs[0].text for arrival in arrivals] == ["a", "b"]
    with pytest.raises(EngineStopped):
        await feed.next_arrivals(silence_s=60)
    await feed.aclose()


async def test_closing_cancels_what_has_not_finished_and_only_that() -> None:
    engine = FakeEngine(reply="ab")
    feed = await open_feed(engine)
    await drain(feed)
    await feed.aclose()
    assert engine.cancelled_ids == []

    engine.hold_at = 1
    feed = await open_feed(engine, prompts=2)
    await feed.next_arrivals(silence_s=60)
    await feed.aclose()
    await feed.aclose()
    assert len(engine.cancelled_ids) == 2
    assert engine.open_ids == set()


async def test_failing_a_feed_wakes_its_reader() -> None:
    feed = await open_feed(FakeEngine(hold_at=0))
    reader = asyncio.create_task(feed.next_arrivals(silence_s=3600))
    await asyncio.sleep(1)
    feed.fail(EngineStopped("stopping"))
    with pytest.raises(EngineStopped, match="stopping"):
        await reader
    await feed.aclose()


async def test_what_is_taken_wakes_nobody_and_what_is_refused_is_returned_after_it() -> None:
    outlet = Outlet(most=3)
    feed = await open_feed(FakeEngine(reply="abcdef"))
    arrivals = await feed.next_arrivals(silence_s=60, outlet=outlet)
    await asyncio.sleep(1)  # nobody waits: what comes now is kept
    assert outlet.texts == ["a", "b", "c"]
    rest = (arrivals or []) + (await feed.next_arrivals(silence_s=60, outlet=outlet) or [])
    assert "".join(arrival.output.outputs[0].text for arrival in rest) == "def"
    await feed.aclose()


async def test_silence_begins_with_the_last_that_was_taken() -> None:
    engine = FakeEngine(reply="abc", hold_at=2)
    loop = asyncio.get_running_loop()
    loop.call_later(5, engine.gate.set)
    feed = await open_feed(engine)
    started_s = loop.time()
    assert await feed.next_arrivals(silence_s=7.5, outlet=Outlet()) is None
    assert loop.time() - started_s == pytest.approx(5)
    await feed.aclose()

    held = FakeEngine(hold_at=0)
    loop.call_later(5, held.gate.set)
    feed = OutputFeed([await each.submit("p", DELTA) for each in (held, FakeEngine(hold_at=0))])
    started_s = loop.time()
    assert await feed.next_arrivals(silence_s=7.5, outlet=Outlet()) == []
    assert loop.time() - started_s == pytest.approx(12.5)
    await feed.aclose()


async def test_who_takes_and_fails_fails_the_feed() -> None:
    feed = await open_feed(FakeEngine())
    with pytest.raises(EngineStopped, match="cannot be written"):
        await feed.next_arrivals(silence_s=60, outlet=FailingOutlet())
    await feed.aclose()


async def test_what_an_engine_sends_past_who_waits_reaches_the_outlet_at_once() -> None:
    outlet = Outlet(most=2)
    stream, feed, waiting = await waited_for(outlet)
    tell(stream, "a")
    tell(stream, "b")
    assert outlet.texts == ["a", "b"], "before anybody else could run"
    assert stream.num_taken == 3, "and the next is waited for"
    tell(stream, "c")
    tell(stream, "d", finish_reason="length")
    assert outlet.texts == ["a", "b"], "it is closed, and an end is for who waits"
    arrivals = await waiting
    assert [arrival.output.outputs[0].text for arrival in arrivals or ()] == ["cd"]
    assert await feed.next_arrivals(silence_s=60, outlet=outlet) is None
    await feed.aclose()


async def test_an_outlet_that_fails_fails_its_feed_and_not_the_engine() -> None:
    stream, feed, waiting = await waited_for(FailingOutlet())
    tell(stream, "a")
    with pytest.raises(EngineStopped, match="cannot be written"):
        await waiting
    await feed.aclose()


async def test_a_feed_that_ended_or_was_left_is_gone_without_a_collection() -> None:
    gc.disable()
    try:
        for is_left in (False, True):
            stream, feed, waiting = await waited_for(Outlet())
            tell(stream, "a")
            if not is_left:
                tell(stream, "b", finish_reason="length")
                assert await waiting is None
            await feed.aclose()
            waiting.cancel()
            await asyncio.wait([waiting])
            left = weakref.ref(feed)
            del feed, stream, waiting
            await asyncio.sleep(1)
            assert left() is None
    finally:
        gc.enable()


class Outlet:
    """Remembers texts, at most so many."""

    def __init__(self, most: int | None = None) -> None:
        self.texts: list[str] = []
        self._most = most

    def is_open(self) -> bool:
        return len(self.texts) != self._most

    def take(self, arrival: Arrival) -> None:
        self.texts.append(arrival.output.outputs[0].text)


class FailingOutlet(Outlet):
    def take(self, arrival: Arrival) -> None:
        raise EngineStopped("cannot be written")


Waiting = asyncio.Task[list[Arrival] | None]


async def waited_for(outlet: Outlet) -> tuple[RequestStream, OutputFeed, Waiting]:
    """An engine's own stream, its feed, and who waits there for what comes next."""
    stream = a_stream(0, params=DELTA)
    feed = OutputFeed([stream])
    waiting = asyncio.create_task(feed.next_arrivals(silence_s=60, outlet=outlet))
    await asyncio.sleep(1)
    return stream, feed, waiting


def tell(stream: RequestStream, text: str, finish_reason: FinishReason | None = None) -> None:
    """The next token came."""
    token = SampledToken(SequenceId(0), ord(text))
    stream.push(Advance(SequenceId(0), token, finish_reason))
    stream.tell()


class Times:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.ttft_s: list[float] = []
        self.itl_s: list[float] = []
        self.e2e_s: list[float] = []
        self.ends: list[str] = []
        self.observe_ttft = self.ttft_s.append
        self.observe_itl = self.itl_s.append
        self.observe_e2e = self.e2e_s.append
        self.count_finished = self.ends.append


async def test_latencies_are_those_of_arrival() -> None:
    engine = FakeEngine(reply="abc", hold_at=1)
    loop = asyncio.get_running_loop()
    times = Times()
    latency = RequestLatency(times, started_at_s=loop.time() - 2, is_streamed=True)
    loop.call_later(3, engine.gate.set)
    feed = await open_feed(engine)
    while (arrivals := await feed.next_arrivals(silence_s=60)) is not None:
        for arrival in arrivals:
            latency.observe(arrival)
    latency.finish(loop.time())
    await feed.aclose()

    assert times.ttft_s == pytest.approx([2])
    assert times.itl_s == pytest.approx([3, 0])
    assert times.e2e_s == pytest.approx([5])
    assert times.ends == ["stop"]


class RepeatingStream:
    """Goes on showing a choice that has ended, as an engine may."""

    request_id = "r"
    prompt_token_ids = (1,)
    shortcut: OutputShortcut | None = None

    def __init__(self) -> None:
        self._rounds = 3

    def __aiter__(self) -> RepeatingStream:
        return self

    async def __anext__(self) -> RequestOutput:
        self._rounds -= 1
        if self._rounds < 0:
            raise StopAsyncIteration
        return RequestOutput(
            request_id="r",
            prompt=None,
            prompt_token_ids=(1,),
            outputs=(
                CompletionOutput(index=0, text="", token_ids=(), finish_reason="stop"),
                CompletionOutput(index=1, text="x", token_ids=(7,)),
            ),
            finished=False,
        )

    def cancel(self) -> None:
        pass


async def test_the_end_of_a_choice_is_shown_once() -> None:
    feed = OutputFeed([RepeatingStream()])
    await asyncio.sleep(1)
    arrivals = await feed.next_arrivals(silence_s=60)
    shown = [choice.index for arrival in arrivals for choice in arrival.output.outputs]
    assert shown == [0, 1, 1, 1]
    await feed.aclose()
