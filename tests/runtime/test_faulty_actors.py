"""What plans do to actors and their mail."""

from __future__ import annotations

import asyncio
import time

import pytest

from pie_async.errors import MailboxClosed
from pie_async.runtime.actor import Actor
from pie_async.runtime.faults import ActorRaises, ClockJump, FaultPlan, Faults, MailDelayed
from pie_async.runtime.faulty_actors import InjectedFault, delay_mail, faulty
from pie_async.runtime.late_mail import LateMail
from pie_async.runtime.mailbox import Mailbox


def armed(*faults) -> Faults:
    return Faults(FaultPlan(faults=faults))


class Recorder(Actor[object]):
    """Keeps what it is sent."""

    def __init__(self, name: str = "recorder", observer=None) -> None:
        super().__init__(name, capacity=8, observer=observer)
        self.mail: list[object] = []

    def handle(self, mail: object) -> None:
        self.mail.append(mail)


async def test_an_actor_raises_at_the_message_that_is_meant_after_the_story_has_it():
    told: list[tuple[str, object]] = []
    faults = armed(ActorRaises(at=(2,), actors=("recorder",), messages=("str",)))
    actor = Recorder(observer=faulty(lambda *note: told.append(note), faults))
    for message in ("a", 1, "b", "c"):
        actor.mailbox.post(message)
    with pytest.raises(ExceptionGroup) as raised:
        await actor.run()
    assert isinstance(raised.value.exceptions[0], InjectedFault)
    assert actor.mail == ["a", 1]
    assert told == [("recorder", "a"), ("recorder", 1), ("recorder", "b")]


async def test_a_clock_that_jumps_makes_timers_in_between_late():
    loop = asyncio.get_running_loop()
    rang_s: list[float] = []
    loop.call_later(5.0, lambda: rang_s.append(loop.time()))
    began_s = loop.time()
    actor = Recorder(observer=faulty(lambda *_: None, armed(ClockJump(at=(1,), seconds=60.0))))
    actor.mailbox.post("a")
    actor.mailbox.close()
    await actor.run()
    assert loop.time() == began_s + 60.0
    await asyncio.sleep(0.001)
    assert rang_s == [began_s + 60.0]


@pytest.mark.realtime
async def test_on_a_real_clock_nothing_moves_for_so_long():
    observe = faulty(lambda *_: None, armed(ClockJump(at=(1,), seconds=0.05)))
    began_s = time.monotonic()
    observe("recorder", "a")
    assert time.monotonic() - began_s >= 0.05


async def test_late_mail_keeps_the_order_of_each_sender():
    mailbox: Mailbox[tuple[str, int]] = Mailbox("late", 16)
    delays = {("a", 1): 3.0, ("b", 1): 1.0, ("b", 2): 0.5}
    LateMail(mailbox, delay_s=lambda mail: delays.get(mail, 0.0), sender_of=lambda mail: mail[0])
    for mail in (("a", 1), ("b", 1), ("a", 2), ("b", 2), ("c", 1)):
        mailbox.post(mail)
    assert mailbox.drain() == [("c", 1)]
    await asyncio.sleep(2.0)
    assert mailbox.drain() == [("b", 1), ("b", 2)]
    mailbox.post(("b", 3))
    assert mailbox.drain() == [("b", 3)], "nothing of its sender is under way"
    await asyncio.sleep(2.0)
    assert mailbox.drain() == [("a", 1), ("a", 2)]


async def test_late_mail_to_an_actor_that_has_ended_is_dropped_and_new_mail_refused():
    mailbox: Mailbox[int] = Mailbox("late", 16)
    LateMail(mailbox, delay_s=lambda _: 1.0, sender_of=lambda _: "")
    mailbox.post(1)
    mailbox.close()
    with pytest.raises(MailboxClosed):
        mailbox.post(2)
    await asyncio.sleep(2.0)
    assert len(mailbox) == 0


async def test_late_mail_that_comes_all_at_once_waits_for_room():
    actor = Recorder()
    LateMail(actor.mailbox, delay_s=lambda mail: 1.0 * (mail == 0), sender_of=lambda _: "")
    for number in range(5 * actor.mailbox.capacity):
        actor.mailbox.post(number)
    running = asyncio.create_task(actor.run())
    await asyncio.sleep(2.0)
    actor.mailbox.close()
    await running
    assert actor.mail == list(range(5 * actor.mailbox.capacity))


async def test_only_the_mail_that_is_meant_is_late():
    one, other = Recorder("one"), Recorder("other")
    faults = armed(MailDelayed(probability=1.0, actors=("one",), messages=("str",), seconds=1.0))
    delay_mail([one, other], faults, lambda message: type(message).__name__)
    for actor in (one, other):
        actor.mailbox.post("a")
        actor.mailbox.post(1)
    assert (one.mailbox.drain(), other.mailbox.drain()) == ([1], ["a", 1])
    await asyncio.sleep(1.5)
    assert one.mailbox.drain() == ["a"]
    assert faults.bites == {"mail_delayed": 1}
