"""Bounds, waiting, closing, and writers that give up."""

from __future__ import annotations

import asyncio

import pytest

from pie_async.errors import MailboxClosed, MailboxFull
from pie_async.runtime.mailbox import Mailbox


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_mail_is_read_in_the_order_it_was_written():
    box: Mailbox[int] = Mailbox("test", 10)
    for number in range(3):
        box.post(number)
    await box.send(3)
    assert [await box.receive() for _ in range(4)] == [0, 1, 2, 3]


async def test_posting_into_a_full_mailbox_raises_and_loses_nothing():
    box: Mailbox[int] = Mailbox("scheduler", 2)
    box.post(1)
    box.post(2)
    with pytest.raises(MailboxFull, match="scheduler mailbox already holds 2"):
        box.post(3)
    assert box.drain() == [1, 2]


async def test_sending_into_a_full_mailbox_waits_for_room():
    box: Mailbox[int] = Mailbox("test", 1)
    box.post(1)
    sending = asyncio.create_task(box.send(2))
    await turns()
    assert not sending.done()
    assert len(box) == 1
    assert await box.receive() == 1
    await sending
    assert await box.receive() == 2


async def test_reading_waits_for_mail():
    box: Mailbox[int] = Mailbox("test", 1)
    reading = asyncio.create_task(box.receive())
    await turns()
    assert not reading.done()
    box.post(5)
    assert await reading == 5


async def test_many_writers_never_exceed_the_bound_and_all_get_in():
    box: Mailbox[int] = Mailbox("test", 2)
    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(box.send(number))
        seen = []
        for _ in range(20):
            await turns(2)
            assert len(box) <= 2
            seen.append(await box.receive())
    assert sorted(seen) == list(range(20))


async def test_the_room_of_a_writer_that_gave_up_goes_to_the_next_one():
    box: Mailbox[int] = Mailbox("test", 1)
    box.post(0)
    first, second = asyncio.create_task(box.send(1)), asyncio.create_task(box.send(2))
    await turns()
    assert await box.receive() == 0  # promises the room to the first writer
    first.cancel()
    await turns()
    assert second.done()
    assert await box.receive() == 2
    assert first.cancelled()


async def test_a_writer_that_gives_up_while_waiting_leaves_no_trace():
    box: Mailbox[int] = Mailbox("test", 1)
    box.post(0)
    first, second = asyncio.create_task(box.send(1)), asyncio.create_task(box.send(2))
    await turns()
    first.cancel()
    await turns()
    assert await box.receive() == 0
    await second
    assert box.drain() == [2]


async def test_closing_lets_what_is_inside_be_read_and_then_ends():
    box: Mailbox[int] = Mailbox("test", 2)
    box.post(1)
    box.close()
    assert box.is_closed
    assert await box.receive() == 1
    assert await box.receive() is None
    assert await box.receive() is None


async def test_closing_wakes_a_waiting_reader():
    box: Mailbox[int] = Mailbox("test", 2)
    reading = asyncio.create_task(box.receive())
    await turns()
    box.close()
    assert await reading is None


async def test_a_closed_mailbox_takes_nothing_more():
    box: Mailbox[int] = Mailbox("compute", 2)
    box.close()
    with pytest.raises(MailboxClosed, match="compute"):
        box.post(1)
    with pytest.raises(MailboxClosed):
        await box.send(1)


async def test_closing_ends_every_waiting_writer():
    box: Mailbox[int] = Mailbox("test", 1)
    box.post(0)
    writers = [asyncio.create_task(box.send(n)) for n in range(3)]
    await turns()
    box.close()
    results = await asyncio.gather(*writers, return_exceptions=True)
    assert [type(result) for result in results] == [MailboxClosed] * 3
    assert box.drain() == [0]


async def test_a_cancelled_reader_takes_no_mail_with_it():
    box: Mailbox[int] = Mailbox("test", 2)
    reading = asyncio.create_task(box.receive())
    await turns()
    box.post(1)
    reading.cancel()
    await turns()
    assert await box.receive() == 1


async def test_draining_makes_room_for_waiting_writers():
    box: Mailbox[int] = Mailbox("test", 1)
    box.post(0)
    sending = asyncio.create_task(box.send(1))
    await turns()
    assert box.drain() == [0]
    await sending
    assert box.drain() == [1]
