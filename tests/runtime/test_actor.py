"""Mail in order, follow-ups beside it, and errors that end the actor."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest

from pie_async.runtime.actor import MAIL_PER_TURN, Actor


class Recorder(Actor[str]):
    """Notes what it handles; `react` may do more."""

    def __init__(self, react: Callable[[Recorder, str], None] | None = None, **options) -> None:
        super().__init__("recorder", capacity=1000, **options)
        self.handled: list[str] = []
        self._react = react

    def handle(self, mail: str) -> None:
        self.handled.append(mail)
        if self._react is not None:
            self._react(self, mail)


def closed(actor: Recorder, *mail: str) -> Recorder:
    for one in mail:
        actor.mailbox.post(one)
    actor.mailbox.close()
    return actor


async def test_mail_is_handled_in_order_until_the_mailbox_is_closed():
    actor = closed(Recorder(), "a", "b", "c")
    await actor.run()
    assert actor.handled == ["a", "b", "c"]


async def test_the_observer_is_told_before_each_message_is_handled():
    told: list[tuple[str, str]] = []

    def react(actor: Recorder, mail: str) -> None:
        assert told[-1] == ("recorder", mail)

    await closed(Recorder(react, observer=lambda *seen: told.append(seen)), "a", "b").run()
    assert [mail for _, mail in told] == ["a", "b"]


async def test_mail_goes_on_while_follow_ups_wait():
    order: list[str] = []

    async def wait(mail: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        order.append(mail)

    def react(actor: Recorder, mail: str) -> None:
        actor.follow_up("wait", wait(mail, {"slow": 2.0, "quick": 1.0}[mail]))

    actor = closed(Recorder(react), "slow", "quick")
    await actor.run()
    assert actor.handled == ["slow", "quick"]
    assert order == ["quick", "slow"]


async def test_it_ends_only_after_its_follow_ups():
    def react(actor: Recorder, mail: str) -> None:
        actor.follow_up("wait", asyncio.sleep(3.0))

    await closed(Recorder(react), "a").run()
    assert asyncio.get_running_loop().time() == 3.0


async def test_a_failed_handler_ends_it_and_cancels_its_follow_ups():
    cancelled: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:
            cancelled.append("follow-up")
            raise

    def react(actor: Recorder, mail: str) -> None:
        if mail == "boom":
            raise ValueError("boom")
        actor.follow_up("wait", wait())

    actor = Recorder(react)
    running = asyncio.create_task(actor.run())
    actor.mailbox.post("start")
    await asyncio.sleep(1.0)
    actor.mailbox.post("boom")
    actor.mailbox.post("never handled")
    with pytest.raises(ExceptionGroup) as caught:
        await running
    assert [str(error) for error in caught.value.exceptions] == ["boom"]
    assert cancelled == ["follow-up"]
    assert actor.handled == ["start", "boom"]


async def test_a_failed_follow_up_ends_it_while_it_waits_for_mail():
    async def fail() -> None:
        await asyncio.sleep(1.0)
        raise ValueError("late")

    actor = Recorder(lambda actor, _: actor.follow_up("fail", fail()))
    actor.mailbox.post("a")
    with pytest.raises(ExceptionGroup, match="TaskGroup") as caught:
        await actor.run()
    assert str(caught.value.exceptions[0]) == "late"


async def test_a_long_queue_does_not_keep_the_loop_from_others():
    actor = closed(Recorder(), *("mail",) * (MAIL_PER_TURN * 4))
    running = asyncio.create_task(actor.run())
    seen = []
    while not running.done():
        await asyncio.sleep(0)
        seen.append(len(actor.handled))
    steps = [later - earlier for earlier, later in itertools.pairwise(seen)]
    assert max(steps) <= MAIL_PER_TURN


async def test_follow_ups_outside_run_are_a_mistake():
    work = asyncio.sleep(0)
    with pytest.raises(AssertionError, match="outside run"):
        Recorder().follow_up("x", work)
    work.close()
