"""Which readers count as gone: those that began to read and then took nothing for the patience."""

from __future__ import annotations

import asyncio

import pytest

from pie_async.readers import LOOKS, Readers
from pie_async.request_stream import RequestStream
from pie_async.sampling_params import SamplingParams
from tests.support.request_streams import a_stream
from tests.test_request_stream import push

PATIENCE_S = 8.0
LATEST_S = PATIENCE_S * (1 + 2 / LOOKS)


class Desk:
    """Open streams, and what was told of them with the time."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self.streams: list[RequestStream] = []
        self.told: list[tuple[float, tuple[int, ...], bool]] = []
        self.readers = Readers(lambda: self.streams, patience_s=patience_s, changed=self._tell)

    def _tell(self, sequences: tuple[int, ...], is_read: bool) -> None:
        self.told.append((asyncio.get_running_loop().time(), sequences, is_read))

    def open(self, *sequences: int, **params) -> RequestStream:
        self.streams.append(a_stream(*sequences, params=SamplingParams(n=len(sequences), **params)))
        return self.streams[-1]

    def push(self, stream: RequestStream, text: str, **options) -> None:
        push(stream, text, **options)
        self.readers.note()


async def test_one_that_stops_reading_is_told_of_once_and_again_when_it_reads_on():
    desk = Desk()
    stream = desk.open(1, 2, output_kind="delta")
    desk.push(stream, "a")
    await anext(stream)
    desk.push(stream, "b")
    await asyncio.sleep(100.0)
    desk.push(stream, "c", sequence=2)
    await asyncio.sleep(100.0)
    (at_s, sequences, is_read), *more = desk.told
    assert PATIENCE_S <= at_s <= LATEST_S
    assert (sequences, is_read, more) == ((1, 2), False, [])
    assert (await anext(stream)).outputs[0].text == "b"
    assert desk.told[1:] == [(200.0, (1, 2), True)]
    desk.push(stream, "d")
    await asyncio.sleep(100.0)
    assert desk.told[2][1:] == ((1, 2), False)


async def test_a_slow_reader_within_its_patience_is_left_alone():
    desk = Desk()
    stream = desk.open(1, output_kind="delta")
    for _ in range(20):
        desk.push(stream, "a")
        await anext(stream)
        desk.push(stream, "b")
        await asyncio.sleep(0.9 * PATIENCE_S)
        await anext(stream)
    assert desk.told == []


async def test_only_what_waits_to_be_taken_counts():
    desk = Desk()
    unopened, waiting, final = desk.open(1), desk.open(2), desk.open(3, output_kind="final")
    reading = [asyncio.create_task(anext(stream)) for stream in (waiting, final)]
    await asyncio.sleep(0)
    desk.push(unopened, "a")  # its reader has not begun
    desk.push(final, "a", sequence=3)  # and this one is not to be had yet
    ended = desk.open(4)
    desk.push(ended, "a", sequence=4)
    await anext(ended)
    desk.push(ended, "b", sequence=4, reason="length")  # nothing left to pause
    await asyncio.sleep(10 * PATIENCE_S)
    assert desk.told == []
    for task in reading:
        task.cancel()


@pytest.mark.parametrize("patience_s", [0.0, PATIENCE_S])
async def test_closed_or_without_patience_everybody_counts_as_reading(patience_s):
    desk = Desk(patience_s)
    stream = desk.open(1)
    desk.push(stream, "a")
    await anext(stream)
    desk.push(stream, "b")
    await asyncio.sleep(100.0)
    assert [is_read for _, _, is_read in desk.told] == ([False] if patience_s else [])
    desk.readers.close()
    assert [is_read for _, _, is_read in desk.told] == ([False, True] if patience_s else [])
    desk.push(stream, "c")
    await asyncio.sleep(100.0)
    assert len(desk.told) == (2 if patience_s else 0)
