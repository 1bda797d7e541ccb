"""Frames between the front and the engine's process."""

from __future__ import annotations

import asyncio
import socket

import msgspec
import pytest

from pie_async.config import EngineConfig
from pie_async.messages import Advance, Cancel, SampledToken, SequencesAdvanced, Submit
from pie_async.metrics import EngineStats
from pie_async.model_info import ModelInfo
from pie_async.resilience import wire
from pie_async.resilience.wire import (
    Alive,
    Failed,
    FromEngine,
    Loading,
    Ready,
    Shortened,
    Start,
    ToEngine,
    Wire,
    WireError,
)
from pie_async.sampling_params import SamplingParams

pytestmark = pytest.mark.realtime

MODEL = ModelInfo(
    name="m", family="f", dtype="float32", vocab_size=9, max_model_len=8, num_parameters=1,
    weight_bytes=4,
)  # fmt: skip
SUBMIT = Submit(
    request=1,
    sequences=(1, 2),
    prompt_tokens=tuple(range(1000)),
    sampling=SamplingParams(logit_bias={3: -1.5}, max_tokens=None),
    seed=2**63,
    max_tokens=7,
    cache_salt="ä",
)
ADVANCED = SequencesAdvanced(
    iteration=3, advances=(Advance(1, SampledToken(1, 5, -0.5, 1, ((5, -0.5),)), "stop", 5),)
)


@pytest.fixture
async def ends():
    """(the front's end, the engine's end, the engine's socket)."""
    ours, theirs = socket.socketpair()
    pairs = [await asyncio.open_connection(sock=sock) for sock in (ours, theirs)]
    front = Wire(*pairs[0], FromEngine)
    engine = Wire(*pairs[1], ToEngine)
    yield front, engine, pairs[1][1]
    for _, writer in pairs:
        writer.close()


@pytest.mark.parametrize(
    "message",
    [
        Start(config=EngineConfig(gpu_memory="80GiB", itl_limit_s=0.5)),
        SUBMIT,
        Cancel(sequences=(1,)),
    ],
)
async def test_commands_arrive_as_they_were_sent(ends, message):
    front, engine, _ = ends
    await front.send(message)
    assert await engine.receive() == message


@pytest.mark.parametrize(
    "message",
    [
        Loading(done=1, total=2),
        Ready(model=MODEL),
        Shortened(max_model_len=5),
        Alive(stats=None),
        Alive(stats=EngineStats(running=3)),
        Failed(kind="ConfigError", message="no", option="pool"),
        ADVANCED,
    ],
)
async def test_facts_arrive_as_they_were_sent(ends, message):
    front, engine, _ = ends
    engine.post(message)
    assert await front.receive() == message


async def test_messages_keep_their_order(ends):
    front, engine, _ = ends
    for number in range(1000):
        engine.post(Loading(done=number, total=1000))
    assert [(await front.receive()).done for _ in range(1000)] == list(range(1000))


async def test_it_says_whether_the_next_message_is_there_already(ends):
    front, engine, writer = ends
    for number in range(3):
        engine.post(Loading(done=number, total=3))
    frame = msgspec.msgpack.encode(Loading(done=3, total=3))
    writer.write(len(frame).to_bytes(4, "little") + frame[:-1])
    await asyncio.sleep(0.05)
    assert not front.has_next, "nobody has looked"
    seen = []
    for _ in range(3):
        await front.receive()
        seen.append(front.has_next)
    assert seen == [True, True, False], "half a message is none"
    writer.write(frame[-1:])
    assert (await front.receive()).done == 3


async def test_a_hangup_is_no_message_even_in_the_middle_of_a_frame(ends):
    front, _, writer = ends
    writer.write((100).to_bytes(4, "little") + b"half")
    writer.close()
    assert await front.receive() is None


@pytest.mark.parametrize(
    "bad",
    [
        (wire.MAX_FRAME_BYTES + 1).to_bytes(4, "little"),
        (3).to_bytes(4, "little") + b"\xc1\xc1\xc1",
        (1).to_bytes(4, "little") + b"\x80",
    ],
    ids=["too long", "not msgpack", "no type"],
)
async def test_what_is_no_message_is_refused(ends, bad):
    front, _, writer = ends
    writer.write(bad)
    with pytest.raises(WireError):
        await front.receive()


async def test_an_end_that_does_not_read_is_not_written_to_without_bound(ends, monkeypatch):
    monkeypatch.setattr(wire, "MAX_UNSENT_BYTES", 100_000)
    front, _, _ = ends
    with pytest.raises(WireError, match="wait to be read"):
        _post_many(front, 10_000)


async def test_sending_waits_for_a_slow_reader(ends):
    front, engine, _ = ends
    sending = asyncio.create_task(_send_many(front, 500))
    await asyncio.sleep(0.05)
    assert not sending.done()
    for _ in range(500):
        assert await engine.receive() == SUBMIT
    await sending


def _post_many(front, count):
    for _ in range(count):
        front.post(SUBMIT)


async def _send_many(front, count):
    for _ in range(count):
        await front.send(SUBMIT)
