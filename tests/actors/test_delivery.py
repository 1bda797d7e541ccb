"""The delivery actor: facts about sequences find their requests' streams."""

from __future__ import annotations

import asyncio

import pytest

from pie_async.actors.delivery import DeliveryActor
from pie_async.errors import EngineStopped
from pie_async.messages import (
    Advance,
    Cancel,
    Drained,
    PromptLogprobs,
    SampledToken,
    SchedulerMail,
    SequencesAdvanced,
)
from pie_async.request_stream import RequestStream
from pie_async.runtime.mailbox import Mailbox
from pie_async.sampling_params import SamplingParams
from tests.support.request_streams import a_stream


class Bench:
    def __init__(self) -> None:
        self.scheduler: Mailbox[SchedulerMail] = Mailbox("scheduler", 16)
        self.finished: list[str] = []
        self.actor = DeliveryActor(
            self.scheduler, on_finished=lambda stream: self.finished.append(stream.request_id)
        )

    def open(self, *sequences: int, **params) -> RequestStream:
        stream = a_stream(*sequences, params=SamplingParams(n=len(sequences), **params))
        self.actor.open(stream)
        return stream

    async def told(self, *facts) -> None:
        for fact in facts:
            self.actor.mailbox.post(fact)
        self.actor.mailbox.close()
        await self.actor.run()


def advanced(*advances: Advance, **more) -> SequencesAdvanced:
    return SequencesAdvanced(iteration=1, advances=advances, **more)


def token(sequence: int, letter: str, reason=None) -> Advance:
    return Advance(sequence, SampledToken(sequence, ord(letter)), reason)


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_tokens_reach_the_stream_of_their_sequence(bench: Bench):
    first, second = bench.open(1), bench.open(2, 3)
    await bench.told(advanced(token(1, "a"), token(3, "c")), advanced(token(2, "b")))
    assert [out.text for out in (await anext(first)).outputs] == ["a"]
    assert [out.text for out in (await anext(second)).outputs] == ["b", "c"]
    assert bench.finished == []


async def test_a_request_is_over_with_its_last_sequence(bench: Bench):
    bench.open(1, 2)
    bench.actor.mailbox.post(advanced(token(1, "a", "length")))
    running = asyncio.create_task(bench.actor.run())
    await asyncio.sleep(1)
    assert bench.finished == []
    bench.actor.mailbox.post(advanced(token(2, "b", "length")))
    await asyncio.sleep(1)
    assert bench.finished == ["request"]
    bench.actor.mailbox.close()
    await running


async def test_a_stop_string_ends_the_sequence_and_tells_the_scheduler(bench: Bench):
    stream = bench.open(1, 2, stop=("bc",))
    await bench.told(advanced(token(1, "b")), advanced(token(1, "c"), token(2, "x")))
    assert bench.scheduler.drain() == [Cancel(sequences=(1,), reason="stop")]
    one, two = (await anext(stream)).outputs
    assert (one.text, one.finish_reason, one.stop_reason) == ("", "stop", "bc")
    assert (two.text, two.finish_reason) == ("x", None)


async def test_tokens_after_a_stop_string_are_dropped(bench: Bench):
    stream = bench.open(1, stop=("b",))
    await bench.told(
        advanced(token(1, "a")),
        advanced(token(1, "b")),
        advanced(token(1, "c")),
        advanced(Advance(1, None, "stop")),
    )
    output = await anext(stream)
    assert output.outputs[0].text == "a"
    assert output.outputs[0].token_ids == (ord("a"), ord("b"))
    assert bench.finished == ["request"]


async def test_facts_about_unknown_sequences_are_passed_over(bench: Bench):
    await bench.told(advanced(token(77, "a")))
    assert bench.finished == []


async def test_prompt_logprobs_reach_the_stream(bench: Bench):
    stream = bench.open(1, prompt_logprobs=0)
    entry = PromptLogprobs(1, 1, (SampledToken(1, ord("p"), -0.5, 2),))
    await bench.told(advanced(token(1, "a"), prompt_logprobs=(entry,)))
    output = await anext(stream)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert output.prompt_logprobs[1][ord("p")].logprob == -0.5


async def test_the_engines_end_fails_every_open_stream_and_ends_draining(bench: Bench):
    streams = [bench.open(1, 2), bench.open(3)]
    bench.actor.fail_all(EngineStopped("gone"))
    for stream in streams:
        with pytest.raises(EngineStopped, match="gone"):
            await anext(stream)
    assert len(bench.finished) == 2
    assert bench.actor.drained.is_set()


async def test_drained_is_passed_on(bench: Bench):
    assert not bench.actor.drained.is_set()
    await bench.told(Drained())
    assert bench.actor.drained.is_set()


async def test_an_abandoned_stream_leaves_nothing_behind(bench: Bench):
    stream = bench.open(1, 2)
    bench.actor.abandon(stream)
    assert bench.finished == [stream.request_id]
    await bench.told(advanced(token(1, "a")))
    bench.actor.fail_all(EngineStopped("over"))
    assert bench.finished == [stream.request_id]
